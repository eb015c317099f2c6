"""A process that has torch loaded and forks a merge for every order on its input, so that fifty kills take seconds.

For each order, a JSON line, it prints the child's process id, what the child says ("begun" at a tenth of the way, or
its error), and "exit" with the status that ended it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import remelt as rm
from remelt.methods import METHODS


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)).replace("\n", " ") + "\n").encode())


def child(order: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(order.get("environment", {}))
    if "file_size" in order:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
    begun = False

    def watch(progress: Any) -> None:
        nonlocal begun
        if 10 * progress.done > progress.total and not begun:  # then the journal has a part
            begun = True
            say("begun")

    try:
        rm.merge(order["recipe"], output=order["output"], watch=watch, overwrite=True, threads=2, **order["options"])
    except KeyboardInterrupt:
        return 130
    except rm.RemeltError as error:
        say("error", error)
        return error.exit_code
    return 0


def main() -> None:
    METHODS.add_file(Path(sys.argv[1]))
    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(child(json.loads(line)))
        say(process)
        _, status = os.waitpid(process, 0)
        say("exit", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
