"""Has the zygote of a test run the program for a shell, and ends as that does: see `zygote.for_a_shell`.

    python -I -S forked.py ADDRESS [argument of the program]...

It imports next to nothing: its start is what it saves.
"""

import _socket as socket
import os
import sys

_, address, *arguments = sys.argv
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(address)
streams = b"".join(stream.to_bytes(4, sys.byteorder) for stream in range(3))
connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
connection.sendall(repr((arguments, dict(os.environ), os.getcwd())).encode())  # noqa: PTH109 - pathlib is slow to import
connection.shutdown(socket.SHUT_WR)
# No answer is a failure, too.
os._exit(int.from_bytes(connection.recv(1) or b"\xff", "big"))
