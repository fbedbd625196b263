"""A worker process of test_shared.py: does what it is told, a line at a time, and says when it is done.

begin ROLE · sample JSON-LIST-OF-STATUSES · end ROLE NUMBER CODE JSON-STATUS
"""

import json
import sys
from pathlib import Path

from korora.metrics.family import Side
from korora.metrics.instruments import Instruments
from korora.metrics.observer import Observer
from tests.korora.metrics.support import report, status


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    observer = Observer(Instruments.shared(directory, name), Side.WORKER, name)
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split(maxsplit=4):
            case ["begin", role]:
                observer.session_begun(role)
            case ["sample", *_]:
                observer.sample([status(**facts) for facts in json.loads(line.partition(" ")[2])], 0.002)
            case ["end", role, number, code, facts]:
                last = status(int(number), role, **json.loads(facts))
                observer.session_ended(report(int(number), role, int(code), seconds=3.0), last)
            case ["spin"]:
                print("done", flush=True)
                while True:
                    observer.session_begun("source")
            case _:
                raise ValueError(line)
        print("done", flush=True)


if __name__ == "__main__":
    main()
