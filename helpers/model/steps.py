"""What a training step does, as far as memory is concerned."""

from dataclasses import dataclass

from helpers.config import ALL_LINEAR_TARGETS, Config
from helpers.model import precision
from helpers.model.architecture import FLOAT32


@dataclass(frozen=True)
class Run:
    """What a training step does, in numbers and names."""

    quantization: str = "nf4-double"  # or "nf4", "16bit"
    keep_in_16bit: tuple[str, ...] = ()  # kinds of linear layers that are not packed
    rank: int = 64
    targets: tuple[str, ...] = ALL_LINEAR_TARGETS
    dropout: float = 0.0
    batch: int = 1
    length: int = 512  # tokens of the longest batch's rows, padding included
    optimizer: str = "adamw_bnb_8bit"
    checkpointing: bool = True
    kept_layers: int = 0  # with checkpointing: the last layers that keep theirs all the same
    offload: bool = False  # on the fast path: see `offloaded_layers`
    accumulation: int = 1
    upcast: bool = False  # `prepare_model_for_kbit_training`: float32 but for what is packed
    compute_bytes: int = 2
    adapter_bytes: int = 2
    autocast: bool = True  # inputs of the adapter, to the compute type and not to the adapter's
    loss: str = "chunked"  # trl's; "full" is transformers', with the logits of all positions
    fast: bool = False  # training.fast, whose batch is packed into one row of `tokens`
    shards: int = 1  # GPUs that hold the weights between them; all bytes are of one of them
    device: str = "cuda"

    @classmethod
    def from_config(cls, config: Config, length: int | None = None) -> "Run":
        """The Run of a Config; a packed batch is full, whatever `length` the longest row has."""
        if config.packing:
            length = config.max_length
        nested = "nf4-double" if config.use_nested_quant else "nf4"
        return cls(
            quantization=nested if config.use_4bit else "16bit",
            keep_in_16bit=config.keep_in_16bit,
            rank=config.lora_r,
            targets=config.target_modules,
            dropout=config.lora_dropout,
            batch=config.per_device_train_batch_size,
            length=length or config.max_length,
            optimizer=config.optim,
            checkpointing=config.activation_checkpointing,
            kept_layers=config.kept_layers or 0,
            offload=config.fast_path and config.activation_offloading,
            accumulation=config.grad_acc_steps,
            compute_bytes=precision.compute_dtype(config).itemsize,
            adapter_bytes=precision.adapter_dtype(config).itemsize,
            autocast=not config.fast_path and any(precision.autocast(config).values()),
            fast=config.fast_path,
            device="cpu" if config.device == "cpu" else "cuda",
        )

    @property
    def tokens(self) -> int:
        """Positions in a batch, padding included."""
        return self.batch * self.length

    @property
    def stream_bytes(self) -> int:
        """Width of a number in the hidden states between the layers."""
        return FLOAT32 if self.upcast else self.compute_bytes

    def offloaded(self, layers: int) -> int:
        """How many of a model's layers have their activations in the host's memory."""
        return len(offloaded_layers(layers, self.kept_layers)) if self.offload else 0


def offloaded_layers(layers: int, kept_layers: int) -> range:
    """Which layers have their activations in the host's memory on the fast path.

    Every second one of those that do not keep theirs, since a fast card computes two layers while
    one travels. After each come `offload_lead` others.
    """
    return range(0, layers - max(kept_layers + 1, offload_lead(kept_layers)), 2)


def offload_lead(kept_layers: int) -> int:
    """For how many layers activations may travel: three to seven. Room that layers which keep
    theirs will take is free yet on the way to the host, and free again on the way back.
    """
    return min(max(3, kept_layers - 1), 7)
