"""The `axonym` command: one word per flow.

In: command line. Out: the flow's exit code; 2 for what the user can mend, with one line on standard error.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable

FLOWS = {
    "demo": ("name planted neurons whose truth is known, on this machine", "axonym demo"),
    "sweep": ("name every unit of the chosen layers", "axonym sweep target=resnet50 probing.uri=photos run=first"),
    "plan": (
        "what a sweep will cost, before anything is loaded",
        "axonym plan experiment=vitl_imagenet images=50000 cpus=16",
    ),
    "status": ("stage by stage, part by part, read from the store", "axonym status run=first"),
    "world": ("make the drawn world's models from nothing", "axonym world out=my_world seed=1"),
    "benchmark": ("every scorer judged by what is known", "axonym benchmark experiment=world scorers=auc,correlation"),
    "calibrate": ("learn how probable it is that a name is right", "axonym calibrate runs=[a,b]"),
    "bench": ("how fast it is beside the bare models, on this machine", "axonym bench what=collection,embedding"),
    "show": ("one neuron in the terminal", "axonym show run=first layer=layer4.2 unit=17"),
}


def overview() -> str:
    width = max(map(len, FLOWS))
    lines = [f"  {name:<{width}}  {what}\n  {'':<{width}}    {example}" for name, (what, example) in FLOWS.items()]
    return (
        "axonym names the neurons of vision models.\n\n"
        + "\n".join(lines)
        + "\n\nGroups and keys: axonym sweep --help, README.md"
    )


def explained(name: str) -> str:
    """What --help says of a flow: its own docstring, and the config's groups and keys where it takes them."""
    from flows.config import described

    module = importlib.import_module(f"flows.{name}")
    return "\n\n".join([str(module.__doc__).strip(), FLOWS[name][1], *([] if name == "bench" else [described()])])


def run_flow(flow: Callable[[list[str]], int], arguments: list[str], resumes: bool = True) -> int:
    """Exit code of a flow; a ValueError is the user's to mend and becomes one line."""
    from flows.stage import StageFailed, environment

    environment()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return flow(arguments)
    except ValueError as error:
        if os.environ.get("AXONYM_TRACEBACK"):
            raise
        _tell([str(error)])
        return 2
    except StageFailed as error:
        _tell(str(error).split("\n"))
        return 1
    except KeyboardInterrupt:
        print("axonym: interrupted" + "; the same command goes on from here" * resumes, file=sys.stderr)
        return 130


def _tell(lines: list[str]) -> None:
    """They may hold what files and servers say: nothing in it acts on the terminal."""
    from flows.show import plain

    print("axonym: " + "\n".join(map(plain, lines)), file=sys.stderr)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, arguments = sys.argv[1], sys.argv[2:]
    if name not in FLOWS:
        print(f"axonym: {name}: no such flow; allowed are {', '.join(FLOWS)}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(arguments):
        print(explained(name))
        return 0
    return run_flow(lambda a: importlib.import_module(f"flows.{name}").main(a), arguments, resumes=name != "bench")


if __name__ == "__main__":
    sys.exit(main())
