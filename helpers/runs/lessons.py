"""The six notebooks: which there are, what code they hold, and where their executed twins lie."""

import hashlib
import json
from pathlib import Path

from helpers.config import PROJECT_DIR, Config, ConfigError

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"


def notebooks(only: str | None = None) -> list[Path]:
    """The numbered notebooks in order, or the one with a number. ConfigError for an unknown one."""
    found = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in found if only is None or path.name.startswith(f"{only}_")]
    if not chosen:
        raise ConfigError(f"no notebook is numbered {only!r}: {', '.join(p.name for p in found)}")
    return chosen


def code_hash(path: Path) -> str:
    """SHA-256 over the sources of a notebook's code cells, in order."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def executed_paths(config: Config, source: Path) -> tuple[Path, Path, Path]:
    """Where the executed notebook lies: finished, while it runs, and after it failed."""
    final = config.executed_dir / source.name
    draft = final.with_name(f".{source.stem}.partial.ipynb")
    return final, draft, final.with_name(f"{source.stem}.failed.ipynb")
