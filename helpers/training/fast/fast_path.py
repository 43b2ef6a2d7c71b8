"""The fast path on a GPU: packed batches of one fixed size, fused kernels, one CUDA graph a step.

A QLoRA step of a 7B model launches some 8,000 small kernels, and many a host cannot launch them as
fast as a card runs them. With every shape fixed, forward and backward pass are recorded once and
replayed as one. `FAST_PATH = False` trains the same batches by trl's own step, to the same losses.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from helpers.config import Config
from helpers.model import plan
from helpers.model.steps import Run
from helpers.prompts import IGNORED_LABEL
from helpers.training.fast.kernels import ChunkedLoss, Pass
from helpers.training.fast.offloading import offload_layers
from helpers.training.machine import RECORDED
from helpers.training.safety import Settings, part_of

WARM_UP_PASSES = 2  # kernels choose their algorithms and compile before anything is recorded


@dataclass
class FixedCollator(DataCollatorForLanguageModeling):
    """trl's padding-free collator, filled up to exactly `tokens`, of which a row has `longest`.

    The filling is a sequence of its own that no row sees and no loss counts. The bounds of `rows`
    rows have one length too: unused ones repeat the end. Raises ValueError for more of either.
    """

    tokens: int = 0
    longest: int = 0
    rows: int = 0

    def torch_call(self, examples: list[dict]) -> dict:
        batch = super().torch_call(examples)
        used = batch["input_ids"].shape[1]
        bounds = batch["cu_seq_lens_q"].tolist()
        rows = len(bounds) - 1
        if used > self.tokens or rows > self.rows:
            raise ValueError(
                f"a packed batch holds {used} tokens in {rows} rows and there is room for "
                f"{self.tokens} in {self.rows}: build the trainer with the rows that it trains on"
            )
        bounds += range(used + self.longest, self.tokens, self.longest)
        room = self.rows + self.tokens // self.longest
        bounds += [self.tokens] * (room + 1 - len(bounds))
        missing = self.tokens - used
        filling = torch.arange(missing)[None] % self.longest
        return {
            "input_ids": F.pad(batch["input_ids"], (0, missing), value=self.pad_token_id),
            "labels": F.pad(batch["labels"], (0, missing), value=IGNORED_LABEL),
            "position_ids": torch.cat([batch["position_ids"], filling], dim=1),
            # Four dimensions tell transformers to build no mask; attention here reads the bounds.
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
            "max_length_q": self.longest,
            "used_tokens": used,
        }


def fixed_collator(config: Config, tokenizer, packed) -> FixedCollator:
    """One whose batches have room for any packed row of these datasets."""
    return FixedCollator(
        tokenizer.pad_token_id,
        padding_free=True,
        tokens=config.per_device_train_batch_size * config.max_length,
        longest=config.max_length,
        rows=max(len(lengths) for dataset in packed for lengths in dataset["seq_lengths"]),
    )


class FastTrainer(SFTTrainer):
    """SFTTrainer, with `safety` among its callbacks, whose step is one recorded CUDA graph."""

    graph = None

    def __init__(self, **arguments):
        super().__init__(**arguments)
        config, packed = part_of(self, Settings).config, (self.train_dataset, self.eval_dataset)
        # trl takes none when it packs
        self.data_collator = fixed_collator(config, self.processing_class, packed)

    def _prepare_for_training(self, *arguments, **options):
        # DDP's part in the backward pass stays in the stream in which DDP was made, and what runs
        # in the default stream cannot be recorded.
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            prepared = super()._prepare_for_training(*arguments, **options)
        before.wait_stream(stream)
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        used = gather_object([inputs.pop("used_tokens")])  # of each process
        self.state.num_input_tokens_seen += sum(used)
        inputs = {**self._prepare_inputs(inputs), "graded": num_items_in_batch}
        if not model.training:
            model.train()
        if self.graph is None:
            self.graph = self._recorded(self.accelerator.unwrap_model(model), inputs)
        loss, processes = self.graph(inputs), self.accelerator.num_processes
        if processes > 1 and self.accelerator.sync_gradients:
            # DDP would do that bit by bit within the pass, which is one piece here.
            torch.distributed.all_reduce(self.graph.gradient)
        return loss * processes  # its share of the step's tokens; the trainer takes the mean

    def _recorded(self, model, inputs: dict) -> "StepGraph":
        """The step as it was planned, recorded on its first batch."""
        step = Run.from_config(part_of(self, Settings).config)
        keep_weights = plan.weights_fit_in_place(model.config, step)
        layers = model.get_base_model().model.layers
        choose_checkpoints(layers, step.kept_layers, keep_weights, step.offload)
        return StepGraph(model, inputs)

    def _load_from_checkpoint(self, *arguments, **options):
        self._forget_recording()
        super()._load_from_checkpoint(*arguments, **options)
        part_of(self, Settings).restore_types(self.model)  # before DDP makes room for gradients

    def _load_best_model(self):
        self._forget_recording()
        super()._load_best_model()

    def _forget_recording(self) -> None:
        """It reads and writes the tensors of the adapter that was, and peft loads others."""
        self.graph = None
        torch.cuda.empty_cache()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of an evaluation, in chunks too: mean nats over the batch's graded tokens."""
        inputs = dict(inputs)
        inputs.pop("used_tokens")
        labels = inputs.pop("labels")
        graded = (labels[0, 1:] != IGNORED_LABEL).sum()
        loss = packed_loss(self.accelerator.unwrap_model(model), inputs, labels, graded)
        return (loss, {}) if return_outputs else loss


class StepGraph:
    """Forward and backward pass over inputs of one shape, recorded once, replayed for each batch.

    A call adds to the gradients of the trainable parameters and returns the loss: mean nats over
    the graded tokens of the whole step.
    """

    def __init__(self, model, inputs: dict):
        self.model = model.train()  # all of it: only a layer in training keeps checkpoints
        self.inputs = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Now, not between activations that will leave gaps, and in one piece: processes add it up.
        sizes = [parameter.numel() for parameter in self.parameters]
        self.gradient = self.parameters[0].new_zeros(sum(sizes))
        parts = zip(self.gradient.split(sizes), self.parameters, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self._clear_gradients()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._forward_backward()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # the recording has memory of its own
        self.graph = torch.cuda.CUDAGraph()
        # In the stream of the warm-up, for which cuBLAS has its room to work in. Checked in this
        # thread alone: NCCL's asks after its events at any moment.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = self._forward_backward()
        self._clear_gradients()

    def __call__(self, inputs: dict) -> torch.Tensor:
        for name, value in inputs.items():
            if torch.is_tensor(value):
                self.inputs[name].copy_(value, non_blocking=True)
        if self.parameters[0].grad is None:  # the trainer drops gradients after each step
            self._clear_gradients()
        self.graph.replay()
        return self.loss.clone()

    def _clear_gradients(self) -> None:
        self.gradient.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _forward_backward(self) -> torch.Tensor:
        inputs = dict(self.inputs)
        labels, graded = inputs.pop("labels"), inputs.pop("graded")
        loss = packed_loss(self.model, inputs, labels, graded)
        loss.backward()
        return loss.detach()


def choose_checkpoints(layers, kept_layers: int, keep_weights: bool, offload: bool = False) -> None:
    """Keep what products made in the last layers, which the backward pass needs first.

    The others run a second time, but with `offload` every second one of them: see offloading.py.
    With `keep_weights` a layer's backward pass takes the 16-bit weights that its second run has
    unpacked.
    """
    run_twice = partial(
        checkpoint,
        **RECORDED,
        context_fn=lambda: (Pass(keep_weights), Pass(keep_weights, is_second=True)),
    )
    ways = [run_twice] * (len(layers) - kept_layers) + [keep_products] * kept_layers
    if offload:
        ways = offload_layers(ways, kept_layers, keep_products)
    for layer, way in zip(layers, ways, strict=True):
        layer._gradient_checkpointing_func = way


def keep_products(forward, *inputs):
    """Run a layer's forward pass, to be walked back without a second run."""
    with Pass(remakes_inputs=True):
        return forward(*inputs)


def packed_loss(model, inputs: dict, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Nats over all graded tokens of one packed row, divided by `count`; labels [1, tokens]."""
    base = model.get_base_model()
    hidden = base.model(**inputs, use_cache=False).last_hidden_state[0]
    next_tokens = F.pad(labels[0, 1:], (0, 1), value=IGNORED_LABEL)
    return ChunkedLoss.apply(hidden, base.lm_head.weight, next_tokens, count)
