"""Greedy answers to many prompts in a fixed number of places: a decoding step is one CUDA graph.

`generate` starts a thousand small programs on the GPU for each token, one after the other from
Python, and waits for the longest answer. Here a step is recorded once (`Places.record`) and played
back, and an answer that has ended leaves its place to a prompt that waits. Keys and values of a row
begin at its first token, so that no step reads padding, and flash attention reads each row as far
as it is written. On a CPU the same steps run without a graph.
"""

import contextlib
from collections import deque
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

TOGETHER = 2048  # tokens of prompts, padding included, that are read at a time
LOOK = 8  # steps between two looks at which answers have ended
PAGE = 256  # flash attention wants pages of keys in multiples of it
KINDS = ("sdpa", "flash", "paged")


class Places:
    """Keys, values and last tokens of up to `rows` answers, of up to `room` tokens with the prompt.

    `kind` is the attention: PyTorch's with a mask over all the room, or flash attention over what
    is written, in one piece or in pages. `compiled` is "" (nothing), "parts" (norm, rotation and
    MLP, seconds) or "whole" (all of the forward pass, a minute); `fused` makes one product of q, k
    and v and one of gate and up, which `fuse` must have prepared.
    """

    def __init__(self, model, rows: int, room: int, kind="sdpa", compiled="", fused=False):
        shape, device = model.config, model.device
        room = -(-room // PAGE) * PAGE if kind == "paged" else -(-room // 8) * 8
        heads, width = shape.num_key_value_heads, shape.head_dim
        self.model, self.rows, self.room, self.kind = model, rows, room, kind
        sizes = (rows, room, heads, width)
        self.kept = [
            [torch.zeros(sizes, dtype=model.dtype, device=device) for _ in range(2)]
            for _ in range(shape.num_hidden_layers)
        ]
        self.tokens, self.lengths, self.going = torch.zeros(3, rows, dtype=int, device=device)
        self.used = torch.ones(rows, dtype=torch.int32, device=device)
        self.row = torch.arange(rows, device=device)
        self.ends = torch.arange(rows + 1, device=device, dtype=torch.int32)
        self.starts, self.column = self.ends * room, torch.arange(room, device=device)
        self.nothing = torch.zeros(rows, room, dtype=model.dtype, device=device)
        pages = torch.arange(rows * room // PAGE, device=device, dtype=torch.int32)
        self.pages = pages.view(rows, -1) if kind == "paged" else None
        self.swaps = swaps(compiled, fused)
        forward = model.forward
        whole = compiled == "whole"
        self.forward = torch.compile(forward, fullgraph=True, dynamic=False) if whole else forward
        self.step = self.record() if device.type == "cuda" else self.plain_step

    def update(self, keys, values, layer: int):
        """What each layer of a Llama asks of its cache: one more token a row (rows, heads, 1, n).

        Returns all keys and values kept, (rows, heads, room, n).
        """
        kept_keys, kept_values = self.kept[layer]
        kept_keys[self.row, self.lengths] = keys.squeeze(2)
        kept_values[self.row, self.lengths] = values.squeeze(2)
        return kept_keys.transpose(1, 2), kept_values.transpose(1, 2)

    @torch.no_grad()
    def plain_step(self) -> None:
        """Put the next token of each row into `tokens`; the last ones go to keys and values."""
        self.used.copy_(self.lengths + 1)
        mask = None
        if self.kind == "sdpa":
            unseen = self.column > self.lengths[:, None]
            mask = self.nothing.masked_fill(unseen, float("-inf"))[:, None, None]
        with self.planned():
            logits = self.forward(
                input_ids=self.tokens[:, None],
                position_ids=self.lengths[:, None],
                attention_mask=mask,
                past_key_values=self,
                places=self,
            ).logits
        self.tokens.copy_(logits[:, -1].argmax(-1))
        self.lengths.add_(self.going)

    @contextlib.contextmanager
    def planned(self):
        """While it lasts: this attention, and the swapped functions. Only steps are meant."""
        shape = self.model.config
        before = shape._attn_implementation
        shape._attn_implementation = "sdpa" if self.kind == "sdpa" else "places"
        with contextlib.ExitStack() as stack:
            for owner, name, function in self.swaps:
                stack.enter_context(patch.object(owner, name, function))
            try:
                yield
            finally:
                shape._attn_implementation = before

    def record(self):
        """A step as a CUDA graph; returns what plays it. No row is going yet, so none is lost."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self.plain_step()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.plain_step()
        return self.graph.replay

    def put(self, rows: list[int], read: "Read", members: range) -> None:
        """Move members of a group of prompts that were read into free rows."""
        device, many = self.tokens.device, slice(members.start, members.stop)
        into, width = torch.tensor(rows, device=device), read.cache.layers[0].keys.shape[2]
        for kept, layer in zip(self.kept, read.cache.layers, strict=True):
            for place, new in zip(kept, (layer.keys, layer.values), strict=True):
                place[into, :width] = new[many].transpose(1, 2)
        self.tokens[into], self.lengths[into] = read.tokens[many], read.lengths[many]
        self.going[into] = 1

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], limits: list[int], ends=()) -> list[list[int]]:
        """The greedy answer to each prompt, up to one of the tokens `ends` or its limit."""
        waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        owners, answers, ready = {}, {}, deque()
        while waiting or ready or owners:
            free = [row for row in range(self.rows) if row not in owners]
            while free and (waiting or ready):
                if not ready:
                    group = next_group(waiting, prompts)
                    read = Read(self.model, [prompts[i] for i in group])
                    ready.append((read, group))
                    answers |= {i: [n] for i, n in zip(group, read.tokens.tolist(), strict=True)}
                read, group = ready[0]
                first = len(read.lengths) - len(group)
                count = min(len(free), len(group))
                self.put(free[:count], read, range(first, first + count))
                owners |= dict(zip(free[:count], group[:count], strict=True))
                free, ready[0] = free[count:], (read, group[count:])
                if count == len(group):
                    ready.popleft()
            written = []
            for _ in range(LOOK):
                self.step()
                written.append(self.tokens.clone())
            new, left = torch.stack(written, 1).tolist(), []
            for row, i in list(owners.items()):
                answers[i] = ended(answers[i] + new[row], limits[i], ends)
                if len(answers[i]) == limits[i] or answers[i][-1] in ends:
                    left.append(row)
                    del owners[row]
            self.going[left] = self.lengths[left] = 0
        return [answers[i] for i in range(len(prompts))]


class Read:
    """A group of prompts, read at once: keys and values, and the first token of each answer.

    Padding stands on the right, where no token of a prompt sees it.
    """

    def __init__(self, model, prompts: list[list[int]]):
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        found = model.model(input_ids=ids, use_cache=True)
        last = found.last_hidden_state[torch.arange(len(rows), device=ids.device), self.lengths - 1]
        self.tokens, self.cache = model.lm_head(last).argmax(-1), found.past_key_values


def next_group(waiting: deque, prompts: list[list[int]]) -> list[int]:
    """Take from the head of the queue what is read together; the longest prompt comes first."""
    size = max(1, TOGETHER // len(prompts[waiting[0]]))
    return [waiting.popleft() for _ in range(min(size, len(waiting)))]


def ended(answer: list[int], limit: int, ends) -> list[int]:
    """An answer up to its limit, or up to the first token that ends it, which is kept."""
    answer = answer[:limit]
    places = [place for place, token in enumerate(answer) if token in ends]
    return answer[: places[0] + 1] if places else answer


# -- What a step is made of


def attend(module, query, key, value, attention_mask, scaling, places, **others):
    """Attention of one new token a row (rows, heads, 1, n) over what `places` has of the row."""
    rows, room = places.rows, places.room
    kept = [each.transpose(1, 2).flatten(0, 1) for each in (key, value)]
    pages = {}
    if places.pages is not None:
        kept = [each.unflatten(0, (rows * room // PAGE, PAGE)) for each in kept]
        pages = {"block_table": places.pages}
    output = flash_attention(
        *(query.squeeze(2), *kept, places.ends, places.starts, 1, room, 0.0, False, False),
        scale=scaling,
        seqused_k=places.used,
        **pages,
    )[0]
    return output[:, None], None


# What `torch.nn.attention.varlen` calls, whose own arguments differ between PyTorch 2.11 and 2.13.
flash_attention = torch.ops.aten._flash_attention_forward
AttentionInterface.register("places", lambda *args, **options: attend(*args, **options))


def fuse(model) -> None:
    """Lay q, k and v of each layer side by side in memory, and gate and up.

    The layers' own weights become views of the whole, so that all else goes on as before.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv = whole_of(attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.gate_up = whole_of(mlp.gate_proj, mlp.up_proj)


def whole_of(*parts) -> torch.Tensor:
    whole = torch.cat([part.weight.data for part in parts])
    sizes = [part.out_features for part in parts]
    for part, piece in zip(parts, whole.split(sizes), strict=True):
        part.weight.data = piece
    return whole


def swaps(compiled: str, fused: bool) -> list[tuple]:
    """(owner, name, function) of what a step has in place of transformers' own functions."""
    found = {
        (modeling_llama.LlamaRMSNorm, "forward"): modeling_llama.LlamaRMSNorm.forward,
        (modeling_llama, "apply_rotary_pos_emb"): modeling_llama.apply_rotary_pos_emb,
        (modeling_llama.LlamaMLP, "forward"): modeling_llama.LlamaMLP.forward,
    }
    found = found if compiled == "parts" else {}
    if fused:
        found[modeling_llama.LlamaMLP, "forward"] = fused_mlp
    if compiled == "parts":
        found = {k: torch.compile(function, dynamic=False) for k, function in found.items()}
    if fused:
        found[modeling_llama.LlamaAttention, "forward"] = fused_attention
    return [(*where, function) for where, function in found.items()]


def fused_mlp(self, x):
    gate, up = F.linear(x, self.gate_up).chunk(2, -1)
    return self.down_proj(self.act_fn(gate) * up)


def fused_attention(self, hidden_states, position_embeddings, attention_mask, places, **others):
    heads, width = self.config.num_attention_heads, self.head_dim
    together = F.linear(hidden_states, self.qkv).unflatten(-1, (-1, width)).transpose(1, 2)
    others = (together.shape[1] - heads) // 2
    query, key, value = together.split([heads, others, others], dim=1)
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = places.update(key, value, self.layer_idx)
    call = sdpa_attention_forward if places.kind == "sdpa" else attend
    options = {"scaling": self.scaling, "places": places}
    output, _ = call(self, query, key, value, attention_mask, **options)
    return self.o_proj(output.flatten(2)), None
