"""One line for what the user got wrong, and how a script ends."""
import errno
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback

import torch.distributed as dist


class UserError(Exception):
    """Something the user got wrong: one line that names it, both values and the remedy.

    Rank 0 prints it, since all ranks meet the same mistake; local: this rank alone knows of it, and
    prints it.
    """

    def __init__(self, text, local=False):
        super().__init__(text)
        self.local = local


# ---- how a script ends ---------------------------------------------------------------------------

def script(main):
    """Runs a stage's main(); a mistake of the user's becomes one line on stderr, from rank 0 alone,
    and exit code 2.

    So does whatever the file system refuses. Any other exception prints its traceback. The process
    group is left only after main() has returned: with NCCL, leaving it is a collective, in which a
    rank that failed would wait for all the others.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a file's name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")

    try:
        main()
    except UserError as error:
        end_of_mistake(error)
    except (OSError, UnicodeEncodeError) as error:
        line = explain(error)
        if line:
            # rank 0 may have met the same
            end(2, error_line(line), after=3)
        end(1, traceback.format_exc())
    except KeyboardInterrupt:
        end(130, "stopped by Ctrl-C")
    # --help, or an exit code that main() has chosen
    except SystemExit:
        raise
    except BaseException:
        # some of torch's are no Exception
        end(1, traceback.format_exc())

    # only a main() that has returned comes here
    if dist.is_initialized():
        dist.destroy_process_group()


def end_of_mistake(error):
    """Ends the process for a UserError."""
    # no other rank is going to say it
    if error.local:
        end(2, error_line(error))
    # ranks other than 0 keep silent about what all of them have met
    speaks = os.environ.get("RANK", "0") == "0"
    end(2, error_line(error) if speaks else "", after=3)


def error_line(text):
    """One line, whatever characters the names in it have."""
    return "error: " + " ".join(str(text).splitlines())


def end(code, text, after=0):
    """Prints `text` and ends the process; on several ranks without another word to the others,
    which may wait for this one.

    after: seconds that ranks other than 0 wait with it. torchrun ends them when the first has gone:
    rank 0 speaks first.
    """
    # asleep, it lets torchrun's SIGTERM end it at once
    if after and os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(after)
    if text:
        print(text.rstrip(), file=sys.stderr, flush=True)

    # alone: Python ends in good order, with atexit and finally
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(code)

    # neither atexit nor finally: what they clean up may wait for the other ranks
    sys.stdout.flush()
    kill_children()
    os._exit(code)


def kill_children():
    """Ends decoding processes, which ignore signals."""
    for process in multiprocessing.active_children():
        process.kill()


# ---- what the file system refuses ----------------------------------------------------------------

# an errno that is missing here is told without a remedy
REMEDIES = {
    errno.ENOSPC: "make room, and run the same command again",
    errno.EDQUOT: "the quota is used up: make room, and run the same command again",
    errno.EROFS: "it is mounted read-only: give a place that can be written to",
    errno.EACCES: "you lack the right to: change it (chmod, chown), or give another place",
    errno.EPERM: "you lack the right to: change it (chmod, chown), or give another place",
    errno.ENOENT: "there is no such file or folder (or it is a link to nothing): look at the path",
    errno.EISDIR: "it is a folder, where a file is wanted: give another name",
    errno.ENOTDIR: "a part of this path is a file, where a folder is wanted: give another name",
    errno.EEXIST: "it is a file, or a link to nothing, where a folder is wanted: give another name",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "links lead in a circle: look at the path",
    errno.EMFILE: "raise the number of files that a process may open: ulimit -n 65536",
    errno.ENFILE: "the machine has too many files open: close other programs",
    errno.EFBIG: "raise the largest size that a file may have: ulimit -f unlimited",
    errno.EIO: "the disk or the network file system fails: run the same command again when it "
               "works",
    errno.ESTALE: "the network file system has lost it: run the same command again",
}

# these are known by no path
PATHLESS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)


def explain(error):
    """One line for what the file system refused: path, reason and remedy. Empty for an error that
    is none of this kind.
    """
    if isinstance(error, UnicodeEncodeError):
        return (f"{error.object!r} cannot be written in {error.encoding}: rename it, or use a "
                f"UTF-8 locale (LANG=C.UTF-8)")

    path = error.filename
    # of a rename: where to
    if error.filename2 is not None:
        path = error.filename2
    if error.errno in REMEDIES and (path is not None or error.errno in PATHLESS):
        place = "" if path is None else f"{path}: "
        return f"{place}{os.strerror(error.errno)}: {REMEDIES[error.errno]}"
    if path is not None and error.errno:
        return f"{path}: {error.strerror}"
    return ""
