"""A lock: nobody else works in a folder meanwhile, on any host that shares the file system."""
import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time

from ddm.errors import UserError
from ddm.files import parse_json

# seconds between two signs of life of a lock's holder
BEAT = 5
# seconds without one, after which a holder that this kernel does not know is dead
SILENCE = 20
# seconds that a network file system may keep the lock of a machine that died
LEASE = 120

# what a lock file says of who holds it
HOLDER = {"host": str, "kernel": str, "pid": int, "since": str}


def this_kernel():
    """Names the running kernel, whose locks its processes see, in containers too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return socket.gethostname()


class Lock:
    """`with Lock(path, what):` nobody else has the lock of this path meanwhile. UserError if
    somebody has it.

    The kernel's lock (flock) ends with its process, whatever killed it. Where hosts do not see each
    other's, the holder touches the file every few seconds: one that stays untouched is a dead
    process's.
    """

    def __init__(self, path, what):
        self.path = path
        self.what = what
        self.file = None

    def __enter__(self):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)

        deadline = time.monotonic() + LEASE
        while self.file is None:
            # not "w": what is in it may be somebody's
            file = open(self.path, "a+b")
            try:
                if self._take(file, deadline):
                    self.file = file
            except FileNotFoundError:
                # its holder has just finished, and removed it
                pass
            finally:
                if self.file is None:
                    file.close()

        # for whoever finds it taken
        holder = {
            "host": socket.gethostname(),
            "kernel": this_kernel(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

        self.file.truncate(0)
        self.file.write(json.dumps(holder).encode())
        self.file.flush()
        # a forked process would hold the lock for as long as it lives
        os.register_at_fork(after_in_child=self.file.close)

        # a daemon, so that it ends with the program, whatever happens
        self.done = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.done.set()
        # while it is still locked: nobody gets hold of a file that is about to go
        with contextlib.suppress(OSError):
            os.remove(self.path)
        self.file.close()

    def _beat(self):
        while not self.done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _take(self, file, deadline):
        """Whether the lock is ours now; False: try again.

        UserError if it is somebody's. FileNotFoundError if it has gone meanwhile.
        """
        taken = False
        by_kernel = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            # a file system without locks: the signs of life must do
            by_kernel = False

        holder = self._holder(file)
        here = holder is None or holder["kernel"] == this_kernel()

        # within one kernel flock alone decides
        if taken and here:
            raise UserError(self._taken(holder))

        # this kernel would say of a process of its own that it lives
        unknown = holder is not None and not (here and by_kernel)
        if unknown and self._shows_life():
            raise UserError(self._taken(holder))

        if taken:
            # by a machine that is dead: the file server gives the lock up in a while
            if time.monotonic() > deadline:
                raise UserError(self._taken(holder))
            return False

        # locked, but perhaps a file that its last holder has removed: then there is another
        return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))

    def _holder(self, file):
        """Who wrote the file, as HOLDER says; None if nobody has yet."""
        file.seek(0)
        try:
            return parse_json(file.read().decode(), HOLDER)
        except ValueError:
            return None

    def _taken(self, holder):
        by = "another process"
        if holder:
            by = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return (f"{self.what} is being worked on by {by} ({self.path}): wait until it has ended, "
                f"or stop it")

    def _shows_life(self):
        """Looks for SILENCE whether the holder touches the file."""
        print(f"{self.path} is of another machine: looking for {SILENCE} s whether its process "
              f"lives", file=sys.stderr, flush=True)

        # clocks of two machines differ: all that counts is whether the time moves
        first = os.stat(self.path).st_mtime_ns
        until = time.monotonic() + SILENCE

        while True:
            last_look = time.monotonic() > until
            # opened anew, a network file system says the truth
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != first:
                    return True
            if last_look:
                return False
            time.sleep(min(1, SILENCE / 4))


@contextlib.contextmanager
def alone(path, what):
    """Lock, held by rank 0 for all of them."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with Lock(path, what):
        yield
