"""How many functions and files one image passes to the optimiser, and one prompt to an image.

    python bench/hops.py --train train_expert.py --run-dir RUN --shard 0 --train.steps 4
    python bench/hops.py --sample sample.py --run-dir RUN --prompt "a red circle" --out x.png

Runs the script in this process and notes each function of the repository that is called: of a
training those of its second step (the first one opens files; no row of the log, no checkpoint: give
--train.log_every and --train.save_every more than the steps); of sampling all from the parsed flags
to the written image. Counts distinct functions and files.
"""
import importlib
import os
import sys


def main():
    kind, script, *flags = sys.argv[1:]
    root = os.path.dirname(os.path.abspath(script))
    sys.path.insert(0, root)
    sys.argv = [script, *flags]
    # in the order of first calls
    seen = {}
    reads = 0
    noting = kind == "--sample"

    def note(frame, event, _):
        nonlocal reads, noting
        if event != "call":
            return
        code = frame.f_code
        path = os.path.abspath(code.co_filename)
        foreign = code.co_filename.startswith("<") or ".venv" in path
        if foreign or not path.startswith(root + os.sep):
            return
        if kind == "--train" and code.co_name == "__getitem__" and path.endswith("data.py"):
            reads += 1
            # from the second step's first image to the third step's
            noting = STEP_IMAGES < reads <= 2 * STEP_IMAGES
        if noting and not code.co_name.startswith("<"):
            seen[os.path.relpath(path, root), code.co_qualname] = None

    stage = importlib.import_module(os.path.basename(script).removesuffix(".py"))
    sys.setprofile(note)
    try:
        stage.main()
    except SystemExit:
        pass
    sys.setprofile(None)
    files = sorted({path for path, _ in seen})
    order = [path for path, _ in seen]
    switches = sum(a != b for a, b in zip(order, order[1:], strict=False))
    print(f"{len(seen)} functions in {len(files)} files; read in the order of their first calls, "
          f"{switches} times another file than the one before")
    for path in files:
        names = sorted(name for other, name in seen if other == path)
        print(f"  {path}: {', '.join(names)}")


STEP_IMAGES = int(os.environ.get("STEP_IMAGES", 16))

if __name__ == "__main__":
    main()
