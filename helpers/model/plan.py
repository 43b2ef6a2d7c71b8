"""The fastest way to take a training step on a card, from predictions alone."""

from dataclasses import dataclass, replace
from itertools import product

from helpers.config import ATTENTION_TARGETS
from helpers.model.predict import GIB, Estimate, Step
from helpers.model.steps import Run

# What is kept free of a prediction for the fast path, in sizes of the widest weight when it is
# unpacked, or as a share of it, whichever is more: gaps beyond those predicted.
MORE_GAPS, SPARE = 3, 0.027
PLANNED_OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit")  # faster first


@dataclass(frozen=True)
class Plan:
    """The fastest run that fits a card, or the smallest one if none does; `advice` says so."""

    fits: bool
    run: Run
    estimate: Estimate
    advice: str

    @property
    def in_short(self) -> str:
        """Rows at a time x batches in a step, and what saves memory; "no" where it does not fit."""
        saving = ["checkpointing"] * self.run.checkpointing
        saving += ["paged"] * self.run.optimizer.startswith("paged")
        short = ", ".join([f"{self.run.batch} x {self.run.accumulation}", *saving])
        return short if self.fits else "no"


def for_card(
    model_config,
    run: Run,
    card_bytes: int,
    reserve_bytes: int = GIB,
    host_room: int = 0,
) -> Plan:
    """The fastest way to take `run`'s step of batch x accumulation rows on a card of `card_bytes`.

    Tried are `candidates` within `host_room` bytes of the host. `reserve_bytes` is a margin for
    CUDA, the desktop and the allocator's gaps.
    """
    room, layers = card_bytes - reserve_bytes, model_config.num_hidden_layers
    asked = Step.of(model_config, run)
    steps = [Step(asked.shape, each) for each in candidates(asked.run, layers)]
    tried = [step for step in steps if step.host <= host_room]
    for step in sorted(tried, key=lambda step: relative_cost(step.run, layers=layers)):
        if _fits(step, room):
            return Plan(True, step.run, step.estimate(), _summary(step, room))
    step = min(tried, key=lambda step: step.estimate().total)
    return Plan(False, step.run, step.estimate(), _advice(step, room))


def _fits(step: Step, room: int) -> bool:
    total = step.estimate().total
    return total + (spare_bytes(step, total) if step.run.fast else 0) <= room


def spare_bytes(step: Step, total: int) -> int:
    """What the planner keeps free of a prediction for the fast path, for gaps beyond it."""
    return max(MORE_GAPS * step.widest_weight, round(SPARE * total))


def relative_cost(run: Run, ridge: int = 500, layers: int = 32) -> tuple[float, bool, bool]:
    """How slow a run is for each token, to rank plans; not a time.

    A frozen weight is passed twice, and again to recompute a layer without its activations. A pass
    costs its tokens plus `ridge`, at which the arithmetic takes as long as unpacking the weights
    (4.5 bytes / 2 operations at 160 to 300 a byte, T4 to H100; roofline, Williams et al. 2009).
    """
    once = run.kept_layers + run.offloaded(layers)
    passes = 2 + run.checkpointing * (1 - once / layers)
    return passes * (1 + ridge / run.tokens), run.optimizer.startswith("paged"), run.offload


def candidates(run: Run, layers: int) -> list[Run]:
    """Every way to take a run's step that is tried.

    Batches that divide the step's rows, checkpointing on and off (on the fast path with any number
    of kept layers, offloaded or not), and its own optimizer or 8-bit AdamW, plain and paged.
    """
    # checkpointing, kept layers, offload
    ways = [(False, 0, False), (True, 0, False)]
    if run.fast:  # where most layers keep theirs there is little to gain by moving the rest
        ways += [(True, kept, False) for kept in range(1, layers + 1)]
        ways += [(True, kept, True) for kept in range(layers // 2)]
    rows, optimizers = run.batch * run.accumulation, (run.optimizer, *PLANNED_OPTIMIZERS)
    plain = [
        replace(run, batch=batch, accumulation=rows // batch, optimizer=optimizer)
        for batch, optimizer in product(whole_batches(rows, run.batch), dict.fromkeys(optimizers))
    ]
    return [
        replace(each, checkpointing=checkpointing, kept_layers=kept, offload=offload)
        for each, (checkpointing, kept, offload) in product(plain, ways)
    ]


def whole_batches(rows: int, most: int) -> list[int]:
    """The batches of up to `most` rows that a step of `rows` rows is made of without a rest."""
    return [batch for batch in range(1, most + 1) if rows % batch == 0]


def _summary(step: Step, room: int) -> str:
    run, total = step.run, step.estimate().total
    kept = f" but for {run.kept_layers} layers" * bool(run.kept_layers)
    moved = ", every second of the others offloaded to the host" * run.offload
    return (
        f"batch {run.batch} x {run.accumulation} accumulated, "
        f"{'with' if run.checkpointing else 'without'} checkpointing{kept}{moved}, "
        f"{run.optimizer}: {total / GIB:.1f} GiB of {room / GIB:.1f}"
    )


def _advice(smallest: Step, room: int) -> str:
    """What to change first when nothing fits: the first change, cheap to dear, that is enough."""
    packed = {"quantization": "nf4-double"}
    changes: dict[str, dict] = {"set USE_4BIT = True and USE_NESTED_QUANT = True": packed}
    changes["set KEEP_IN_16BIT = ()"] = {"keep_in_16bit": ()}
    length = smallest.run.length // 2
    while length >= 64:
        changes[f"set MAX_LENGTH = {length}, which leaves out longer rows"] = {"length": length}
        length //= 2
    least = {"rank": 8, "targets": ATTENTION_TARGETS, "length": 64}
    changes["train fewer parameters: rank 8 on q_proj and v_proj, with short rows"] = least
    for says, change in changes.items():
        if _fits(smallest.with_run(**change), room):
            return says
    weights = f"{smallest.weights / GIB:.1f} GiB of {room / GIB:.1f}"
    return f"the weights take {weights}: choose a smaller model or a larger card"


def weights_fit_in_place(model_config, run: Run) -> bool:
    """Whether one layer's 16-bit weights take no more than what is free when they are kept: when a
    checkpoint runs again, the activations of layers that keep theirs are gone.
    """
    step = Step.of(model_config, run)
    free = run.kept_layers * step.kept_layer - step.layer - step.travelling
    return run.checkpointing and sum(step.shape.layer_weights) * run.compute_bytes <= free
