"""Own rows that are not code, in all six notebooks: 300 orders of a cafe, as its till takes them.

The base does not know the till's language; the tuned model should write it for orders that it has
not seen:  python -m benchmarks.own_task FOLDER
Needs two CPU cores, 4 GB of memory and ten minutes. Writes benchmarks/results/own_task.json.
"""

import json
import random
import sys
import time
from pathlib import Path

from helpers.config import Config
from helpers.runs import runner
from helpers.runs.environment import environment

RESULT = Path(__file__).parent / "results" / "own_task.json"
SYSTEM_MESSAGE = "You turn a guest's order into one line for our till."
DRINKS = {
    "espresso": "ESP", "flat white": "FLW", "mint tea": "MNT", "hot chocolate": "CHO",
    "iced coffee": "ICE", "lemonade": "LEM", "oat latte": "OLT", "tonic water": "TON",
}  # fmt: skip
SIZES = {"small": "S", "medium": "M", "large": "L"}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
GUESTS = "Ada Ben Cleo Dora Emil Finn Gita Hugo Ines Jonas Kira Lars Mona Nils Olga Piet".split()
ASKED = (
    "Could I have {count} {size} {drink} for {guest}, please?",
    "{guest} would like {count} {size} {drink}.",
    "For {guest}: {drink}, {size}, {count} of them.",
    "Put {count} {drink} on the list, {size}, the name is {guest}.",
)


def rows(number: int = 300, seed: int = 42) -> list[dict]:
    """`number` orders, no two alike, with the till's line as the answer."""
    draw, found = random.Random(seed), {}
    while len(found) < number:
        count, size, drink = (draw.choice(sorted(names)) for names in (COUNTS, SIZES, DRINKS))
        guest = draw.choice(GUESTS)
        order = draw.choice(ASKED).format(count=count, size=size, drink=drink, guest=guest)
        found[order] = f"{guest.upper()} | {COUNTS[count]} x {DRINKS[drink]}-{SIZES[size]}"
    return [{"question": order, "answer": line} for order, line in found.items()]


def main(folder: str) -> None:
    """Write the rows, run the six notebooks of profile `demo` on them, and note the two rates."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    source = place / "orders.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    given = {"DATA_SOURCE": str(source), "SYSTEM_MESSAGE": SYSTEM_MESSAGE, "RUN_DIR": str(place)}
    # All orders are cast in one mould, so only copies count as duplicates.
    given |= {"NEAR_DUPLICATE_SIMILARITY": 1.0, "MAX_STEPS": 40}
    start = time.perf_counter()
    runner.run("demo", parameters=given)
    minutes = (time.perf_counter() - start) / 60
    config = Config.from_parameters({"PROFILE": "demo", **given})
    found = json.loads((config.run_dir / "metrics" / "06.json").read_text("utf-8"))
    result = {
        **environment(),
        "minutes": round(minutes, 1),
        **{
            name: value for name, value in found.items() if name.startswith(("own_", "forgetting_"))
        },
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
