"""Will it fit? The memory of a QLoRA training step, predicted from shapes alone, and measured.

Every part is counted from the code that allocates it (transformers' Llama layers, peft's LoRA
layer, bitsandbytes, the loss); gaps between tensors alone are fitted to measurements. Sizes are in
bytes. It knows layers of Llama's kind: four attention projections, a gated MLP, RMSNorm. Of a Qwen
or a Gemma it leaves out biases and the norms of queries and keys, thousandths of the weights; only
`footprint_bytes` counts them too.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from helpers.config import ALL_LINEAR_TARGETS, ATTENTION_TARGETS, PROJECT_DIR, Config
from helpers.model import precision

GIB = 2**30
MEASURED_STEPS = PROJECT_DIR / "benchmarks" / "results" / "qlora_step_memory.json"
BLOCK, NESTED_BLOCK = 64, 256  # weights under one constant, constants under one second constant
FLOAT32 = 4
# trl 1.16 projects to the vocabulary in tiles of 4,096 tokens by 32,768 words
# (kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768
CPU_TILE_TOKENS = 128  # training.fast.answer_head: 25 MB in float32 for 49,152 words
LOSS_CHUNK = 1024  # tokens whose logits exist at one time on the fast path
# Its two streams (of the recording and of all else) each give cuBLAS and cuBLASLt 32 MiB to work
# in, the size that torch chooses on an H100; older cards get 8.
GRAPH_WORKSPACES = 2 * 2 * 32 * 2**20
# A recorded step cannot give memory back, so gaps too small for the next tensor stay reserved.
# Measured, in sizes of the widest weight when it is unpacked: 1 to 9, which is 3.5 % less to 2.7 %
# more than is predicted (benchmarks/caps.py). The planner keeps 3 more, or such a share, free.
GAPS = 4
# Bytes of state a parameter needs: two moments. "torch" keeps them in the parameter's own type,
# bitsandbytes in 32 bits, or in 8 bits with one 32-bit constant for 256 values.
EIGHT_BIT_STATE = 2 * (1 + FLOAT32 / NESTED_BLOCK)
OPTIMIZERS = {
    "adamw_torch": "torch",
    "adamw_torch_fused": "torch",
    "adamw_bnb_8bit": EIGHT_BIT_STATE,
    "adamw_8bit": EIGHT_BIT_STATE,
    "paged_adamw_8bit": EIGHT_BIT_STATE,
    "paged_adamw_32bit": 2 * FLOAT32,
    "paged_adamw": 2 * FLOAT32,
}
SMALLEST_PAGED, SMALLEST_8BIT = 100_000, 4_096  # elements; bitsandbytes/optim/optimizer.py
# hidden, inner, layers, heads, heads of keys and values
LLAMA2_SHAPES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Run:
    """What a training step does, as far as memory is concerned.

    `length` is that of the longest batch, padding included, in tokens. `upcast` says that peft's
    `prepare_model_for_kbit_training` ran: embeddings, norms, head and hidden states are float32.
    `loss` is "full" (transformers: logits of all positions) or "chunked" (trl 1.16). `fast` is
    `training.fast`, whose batch is packed into one row of `tokens`. `shards` is the number of
    GPUs that hold the weights between them (FSDP); all bytes are then those of one of them. Raises
    ValueError for an unknown quantization, optimizer, loss or device.
    """

    quantization: str = "nf4-double"  # or "nf4", "16bit"
    rank: int = 64
    targets: tuple[str, ...] = ALL_LINEAR_TARGETS
    dropout: float = 0.0
    batch: int = 1
    length: int = 512
    optimizer: str = "adamw_bnb_8bit"
    checkpointing: bool = True
    # With checkpointing: the last layers that keep their activations all the same.
    kept_layers: int = 0
    # Checkpoints wait in the host's memory (SFTConfig(activation_offloading=)). On the fast path:
    # activations of every second layer of those that do not keep them.
    offload: bool = False
    accumulation: int = 1
    upcast: bool = False
    compute_bytes: int = 2
    adapter_bytes: int = 2
    # Inputs of the adapter are cast to the compute type, not to the adapter's.
    autocast: bool = True
    loss: str = "chunked"
    fast: bool = False
    shards: int = 1
    device: str = "cuda"

    def __post_init__(self):
        for name, value, known in (
            ("quantization", self.quantization, ("nf4", "nf4-double", "16bit")),
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("loss", self.loss, ("full", "chunked")),
            ("device", self.device, ("cuda", "cpu")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")

    @classmethod
    def from_config(cls, config: Config, length: int | None = None) -> "Run":
        """The Run of a Config under trl, whose adapters are bfloat16 (float32 with fp16=True).

        `length` is that of the longest row. A packed batch is full, however long its rows are.
        """
        if config.packing:
            length = config.max_length
        nested = "nf4-double" if config.use_nested_quant else "nf4"
        return cls(
            quantization=nested if config.use_4bit else "16bit",
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

    @property
    def adapter_input_bytes(self) -> int:
        """Width of a number that an adapter's matrices read."""
        return self.compute_bytes if self.autocast else self.adapter_bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment of a step, part by part; `moment` says which one that is.

    The moments: "loss" (every activation and the logits), "backward" (one layer recomputed or
    walked back), "step" (all gradients and the optimizer's states).
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    moment: str

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name, without the moment."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "moment"}

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


# -- Shapes and weights


def llama2_config(size: str = "7B") -> LlamaConfig:
    """The public shape of a Llama 2 model, "7B", "13B" or "70B", without its weights.

    Source: Touvron et al. 2023, arXiv 2307.09288, and the config.json of each model.
    """
    hidden, inner, layers, heads, key_heads = LLAMA2_SHAPES[size]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def linear_shapes(model_config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a decoder layer's linear layers by name; one layer, not all of them."""
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    head = head_width(model_config)
    queries = model_config.num_attention_heads * head
    keys = model_config.num_key_value_heads * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def head_width(model_config) -> int:
    """Width of one attention head."""
    given = getattr(model_config, "head_dim", None)
    return given or model_config.hidden_size // model_config.num_attention_heads


def linear_parameters(model_config) -> int:
    """Weights of all decoder layers' linear layers: those that are quantized."""
    one = sum(outputs * inputs for outputs, inputs in linear_shapes(model_config).values())
    return model_config.num_hidden_layers * one


def other_parameters(model_config) -> int:
    """Weights that stay unpacked: embedding, head (unless tied), two norms a layer, one more."""
    tables = 1 if model_config.tie_word_embeddings else 2
    norms = 2 * model_config.num_hidden_layers + 1
    return (tables * model_config.vocab_size + norms) * model_config.hidden_size


def quantized_bytes(parameters: int, double: bool) -> int:
    """Bytes of one 4-bit tensor with its constants (QLoRA, section 3, "Double Quantization").

    Half a byte a weight; for each 64 weights a 32-bit constant, or with double quantization an
    8-bit one, a 32-bit one for each 256 of those, and one 32-bit mean.
    """
    blocks = math.ceil(parameters / BLOCK)
    constants = FLOAT32 * blocks
    if double:
        constants = blocks + FLOAT32 * math.ceil(blocks / NESTED_BLOCK) + FLOAT32
    return math.ceil(parameters / 2) + constants


def weight_bytes(model_config, run: Run) -> int:
    """All weights of the base model as they lie on the device, constants included.

    Of a model in shards a device has its share; the constants are no parameters and lie on each.
    """
    other = other_parameters(model_config) * run.stream_bytes
    if run.quantization == "16bit":
        whole = linear_parameters(model_config) * run.compute_bytes + other
        return math.ceil(whole / run.shards)
    double, packed = run.quantization == "nf4-double", linear_parameters(model_config) // 2
    one = sum(quantized_bytes(o * i, double) for o, i in linear_shapes(model_config).values())
    constants = model_config.num_hidden_layers * one - packed
    return math.ceil((packed + other) / run.shards) + constants


def gathered_bytes(model_config, run: Run) -> int:
    """What FSDP has put together again at one moment, besides the device's own share.

    Three decoder layers (one computes, the next one arrives, in a buffer first), each with its
    adapters and their gradients, and the head, which stays whole from its first use on.
    """
    if run.shards == 1:
        return 0
    layers = model_config.num_hidden_layers
    width = run.compute_bytes if run.quantization == "16bit" else 0.5
    layer = linear_parameters(model_config) / layers * width
    layer += 2 * lora_parameters(model_config, run.rank, run.targets) / layers * run.adapter_bytes
    head = model_config.vocab_size * model_config.hidden_size * run.stream_bytes
    return round(3 * layer) + head


# -- What is trained


def adapter_tensors(model_config, rank: int, targets) -> list[int]:
    """Elements of each LoRA matrix: rank x inputs and outputs x rank, target by target."""
    one = [
        rank * side
        for name, shape in linear_shapes(model_config).items()
        if name in targets
        for side in shape
    ]
    return one * model_config.num_hidden_layers


def lora_parameters(model_config, rank: int = 64, targets=ATTENTION_TARGETS) -> int:
    """Trainable parameters: rank x (inputs + outputs) over the targets (LoRA, section 4.1)."""
    return sum(adapter_tensors(model_config, rank, targets))


def share_of_adapters(model_config, run: Run) -> int:
    """Trainable parameters that one device holds, with their gradients and optimizer's states."""
    return math.ceil(lora_parameters(model_config, run.rank, run.targets) / run.shards)


def optimizer_bytes(model_config, run: Run) -> int:
    """Two moments for each trainable parameter, in the optimizer's own width.

    bitsandbytes keeps tensors below 4,096 elements in 32 bits. Paged states of 100,000 elements
    or more lie in managed memory, from which the driver moves them to the host under pressure:
    counted as none.
    """
    width, total = OPTIMIZERS[run.optimizer], 0.0
    for elements in adapter_tensors(model_config, run.rank, run.targets):
        if width == "torch":
            total += elements * 2 * run.adapter_bytes
        elif not (run.optimizer.startswith("paged") and elements >= SMALLEST_PAGED):
            total += elements * (width if elements >= SMALLEST_8BIT else 2 * FLOAT32)
    return round(total / run.shards)


# -- What a step holds


def layer_activation_bytes(model_config, run: Run) -> int:
    """What autograd keeps of one decoder layer's forward pass for its backward pass.

    Read off modeling_llama.py and peft's Linear4bit; see the four helpers. bitsandbytes keeps
    the packed weight only, so a frozen projection costs nothing: what is kept is kept for norms,
    attention, the gate and the adapters.
    """
    hidden = model_config.hidden_size
    # RMSNorm keeps its input, transformers' own in float32, and one reciprocal root for each token.
    norms = 2 * (hidden * (run.stream_bytes if run.fast else FLOAT32) + FLOAT32)
    per_token = norms + _attention_bytes(model_config, run) + _gate_bytes(model_config, run)
    per_token += _input_bytes(model_config, run) + _low_rank_bytes(model_config, run)
    # The boolean mask, made additive; flash attention reads the rows' bounds instead.
    mask = 0 if run.fast else run.batch * run.length**2 * run.stream_bytes
    return per_token * run.tokens + mask


def _attention_bytes(model_config, run: Run) -> int:
    """Query, key, value, output at full head count, and a float32 log-sum-exp a head (sdpa)."""
    width = model_config.num_attention_heads * head_width(model_config)
    return 4 * width * run.stream_bytes + model_config.num_attention_heads * FLOAT32


def _gate_bytes(model_config, run: Run) -> int:
    """The gate before and after SiLU, and the branch it multiplies; fused, no gate after."""
    return (2 if run.fast else 3) * model_config.intermediate_size * run.stream_bytes


def _low_rank_bytes(model_config, run: Run) -> int:
    """Inputs of the B matrices, for each token."""
    return len(run.targets) * run.rank * run.adapter_input_bytes


def _input_bytes(model_config, run: Run) -> int:
    """Inputs of the A matrices, for each token.

    Layers that read the same tensor (q, k, v; gate, up) share one copy, unless dropout or a cast
    gives each its own; the input of o_proj is the attention's output, which is kept anyway.
    """
    cast, dropped = run.adapter_input_bytes != run.stream_bytes, run.dropout > 0
    shared, total = set(), 0
    for name, (_, inputs) in linear_shapes(model_config).items():
        if name not in run.targets:
            continue
        group = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name, name)
        own = cast or dropped
        if own or (group not in shared and name != "o_proj"):
            total += inputs * (run.adapter_input_bytes + (1 if dropped else 0))
        shared.add(group)
    return total


def kept_layer_bytes(model_config, run: Run) -> int:
    """The same of a layer that keeps its activations between layers with checkpoints.

    The fast path makes inputs of adapters again there, from what norms and gates keep anyway.
    """
    made_again = run.tokens * _input_bytes(model_config, run) if run.fast else 0
    return layer_activation_bytes(model_config, run) - made_again


def checkpoint_bytes(model_config, run: Run) -> int:
    """One hidden state: all that checkpointing keeps of a layer (Chen et al., arXiv 1604.06174)."""
    return run.tokens * model_config.hidden_size * run.stream_bytes


def held_bytes(model_config, run: Run) -> int:
    """Activations kept between forward and backward, over all layers, and the last norm's input."""
    layers, state = model_config.num_hidden_layers, checkpoint_bytes(model_config, run)
    last_norm = run.tokens * model_config.hidden_size * FLOAT32
    if run.fast:  # its input, and its output for the loss, which is taken in chunks
        last_norm = 2 * state
    layer = layer_activation_bytes(model_config, run)
    if not run.checkpointing:
        # The embedding is frozen, so nothing is kept for the norm that follows it.
        return layers * layer + (last_norm if run.fast else 0)
    kept = min(run.kept_layers, layers)
    kept_bytes = kept * kept_layer_bytes(model_config, run)
    checkpoints = layers - kept - offloaded_count(run, layers)
    if run.offload and not run.fast:
        checkpoints = 2  # one is in use while the next one travels
    return last_norm + kept_bytes + checkpoints * state


def offloaded_layers(layers: int, kept_layers: int) -> range:
    """Which layers the fast path offloads, of those that do not keep their activations.

    Every second one: a card that is fast for its bus computes two layers while one travels. After
    each come `offload_lead` others.
    """
    return range(0, layers - max(kept_layers + 1, offload_lead(kept_layers)), 2)


def offloaded_count(run: Run, layers: int) -> int:
    return len(offloaded_layers(layers, run.kept_layers)) if run.fast and run.offload else 0


def offload_lead(kept_layers: int) -> int:
    """For how many layers activations may travel: three to seven, where that costs nothing.

    With as many layers that keep theirs, and one more, it does not: what those will take is free
    yet on the way to the host, and free again on the way back.
    """
    return min(max(3, kept_layers - 1), 7)


def travelling_bytes(model_config, run: Run) -> int:
    """What is on the GPU of layers whose activations are on their way, at most."""
    travelling = 1 + offload_lead(run.kept_layers) // 2
    return run.offload * run.fast * travelling * kept_layer_bytes(model_config, run)


def host_bytes(model_config, run: Run) -> int:
    """What the fast path's offloaded activations take of the host's memory."""
    count = offloaded_count(run, model_config.num_hidden_layers)
    return count * kept_layer_bytes(model_config, run)


def loss_bytes(model_config, run: Run) -> int:
    """The most that the loss holds at once.

    The fast path holds the gradient of all hidden states, and a chunk's logits with theirs. "full":
    transformers upcasts the logits; in the backward pass log-softmax, its gradient and the gradient
    of the logits stand side by side, in float32. "chunked": on a GPU one 16-bit tile of trl's and
    the gradient of the hidden states in float32; on a CPU three float32 tiles of `answer_head`
    (logits, probabilities, a product) and the derivative by the hidden states.
    """
    width, words = model_config.hidden_size, model_config.vocab_size
    if run.fast:
        chunk = min(run.tokens, LOSS_CHUNK) * words
        return (run.tokens * width + 2 * chunk) * run.compute_bytes
    if run.loss == "full":
        return 3 * FLOAT32 * run.tokens * words
    if run.device == "cpu":
        tile = min(run.tokens, CPU_TILE_TOKENS) * words
        return run.tokens * width * run.compute_bytes + 3 * FLOAT32 * tile
    tile = min(run.tokens, TILE_TOKENS) * TILE_WORDS
    return run.tokens * width * FLOAT32 + tile * run.compute_bytes


def backward_bytes(model_config, run: Run) -> int:
    """What walking back through one layer needs besides its activations.

    The residual's gradient twice, three gradients as wide as the MLP's middle (base path, adapter
    path, their sum), and the widest weight dequantized. The fast path has two of the three when it
    dequantizes one: those of gate and up.
    """
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    wide = 2 if run.fast else 3
    gradients = run.tokens * (2 * hidden + wide * inner) * run.stream_bytes
    widest = 0 if run.quantization == "16bit" else widest_weight_bytes(model_config, run)
    return gradients + widest


def widest_weight_bytes(model_config, run: Run) -> int:
    """The largest linear layer's weight, unpacked to be multiplied with."""
    widest = max(outputs * inputs for outputs, inputs in linear_shapes(model_config).values())
    return widest * run.compute_bytes


def evaluation_bytes(model_config, run: Run) -> int:
    """What the fast path takes beside the memory that its recorded step keeps: an evaluation.

    One layer's widest moment without gradients (residual, norm, the MLP's three wide tensors), or
    the last hidden state and of a chunk the logits and their gradient, which come together.
    """
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    layer = run.tokens * (3 * hidden + 3 * inner)
    head = run.tokens * hidden + 2 * min(run.tokens, LOSS_CHUNK) * model_config.vocab_size
    return max(layer, head) * run.compute_bytes


def mapped_file_bytes(model_config, run: Run) -> int:
    """On a CPU: pages of the 16-bit checkpoint that were read to quantize it and stay resident.

    safetensors maps the file; the pages are clean, the system takes them back when it needs room.
    """
    on_cpu = run.device == "cpu" and run.quantization != "16bit"
    return 2 * linear_parameters(model_config) if on_cpu else 0


def estimate(model_config, run: Run, baseline: int = 0) -> Estimate:
    """Predicted peak of a training step: the fullest of its moments, part by part.

    `baseline` is what the process holds before the model is loaded (`current_memory_bytes()`
    after the imports) and matters on a CPU. On a GPU the result stands for
    `torch.cuda.max_memory_allocated()`, on the fast path for `max_memory_reserved()`, because a
    recorded step keeps its memory: the CUDA context, a few hundred MB, is in neither.
    """
    moments = _moments(model_config, run)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    parts = dict(moments[name])
    parts["overhead"] += baseline + mapped_file_bytes(model_config, run)
    if run.fast:
        parts["overhead"] += evaluation_bytes(model_config, run) + GRAPH_WORKSPACES
        parts["overhead"] += GAPS * widest_weight_bytes(model_config, run)
    parts["overhead"] += gathered_bytes(model_config, run)
    return Estimate(
        weights=weight_bytes(model_config, run),
        adapters=share_of_adapters(model_config, run) * run.adapter_bytes,
        optimizer=optimizer_bytes(model_config, run),
        moment=name.split("-")[0],
        **parts,
    )


def _moments(model_config, run: Run) -> dict[str, dict[str, int]]:
    """Gradients, activations, logits and overhead at each moment; the rest is always there."""
    layers = model_config.num_hidden_layers
    gradients = share_of_adapters(model_config, run) * run.adapter_bytes
    # Before the first optimizer step of several accumulated batches the gradients are kept.
    # A recorded step always has them in one place.
    kept = gradients if run.accumulation > 1 or run.fast else 0
    layer = layer_activation_bytes(model_config, run)
    held, back = held_bytes(model_config, run), backward_bytes(model_config, run)
    # Layers that keep their activations come first; theirs are gone when a checkpoint runs again.
    gone = run.kept_layers * kept_layer_bytes(model_config, run)
    again = layer + travelling_bytes(model_config, run)
    recomputed = max(0, again - gone) if run.checkpointing else 0
    one_layer = layer + (checkpoint_bytes(model_config, run) if run.checkpointing else 0)
    logits = loss_bytes(model_config, run)

    def moment(gradients, activations, logits, overhead):
        return {
            "gradients": gradients,
            "activations": activations,
            "logits": logits,
            "overhead": overhead,
        }

    return {
        "loss": moment(kept, held, logits, 0),
        "backward-top": moment(max(kept, gradients // layers), held + recomputed, 0, back),
        "backward-bottom": moment(gradients, one_layer, 0, back),
        "step": moment(gradients, 0, 0, 0),
    }


def measured_steps(path: Path = MEASURED_STEPS) -> dict[str, tuple[Run, int]]:
    """Training steps at Llama 2 7B's shape that were measured on a GPU: name -> (Run, peak bytes).

    The file also says on what hardware, when, and with which versions.
    """
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {row["name"]: (Run(**row["run"]), row["measured_bytes"]) for row in rows}


def cache_bytes(model_config, tokens: int, width: int = 2) -> int:
    """Keys and values that answering keeps of `tokens` tokens, at `width` bytes a number."""
    heads = getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    each = 2 * heads * head_width(model_config) * width
    return model_config.num_hidden_layers * each * tokens
