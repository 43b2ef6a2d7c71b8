"""Activations of some layers wait in the host's memory between forward and backward pass.

They travel while other layers compute, so the step need not wait, and their layers run once.
Everything is enqueued in order, without a look at what has arrived: a CUDA graph can record it.
"""

from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from helpers.model.steps import offload_lead, offloaded_layers


class Offloaded:
    """`run`, of a layer's forward pass; what that saves goes to the host, and returns when told to.

    `stream` copies. The host's buffers are used again: all passes must be of one shape.
    """

    def __init__(self, run, stream: torch.cuda.Stream):
        self.run, self.stream, self.buffers = run, stream, []

    def __call__(self, forward, hidden_states, *inputs):
        self.leaving, self.places, self.views = [], {}, []
        self.smallest = hidden_states.nbytes  # adapters and sums are not worth a copy
        with saved_tensors_hooks(self.send, self.take):
            output = self.run(forward, hidden_states, *inputs)
        self.has_left = self.stream.record_event()
        return output

    def send(self, tensor: torch.Tensor):
        """Begin to copy what a tensor is a view of, once for all views; what `take` needs."""
        if tensor.nbytes < self.smallest:
            return tensor
        storage = tensor.untyped_storage()
        place = self.places.setdefault(storage.data_ptr(), len(self.leaving))
        if place == len(self.leaving):
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            if place == len(self.buffers):
                self.buffers.append(torch.empty_like(whole, device="cpu", pin_memory=whole.is_cuda))
            self.leaving.append(whole)
            self.views.append(0)
            self._copy([self.buffers[place]], [whole])
        self.views[place] += 1
        return place, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def leave(self) -> None:
        """Wait for the copies to the host, and let go of the originals."""
        torch.cuda.current_stream().wait_event(self.has_left)
        self.leaving.clear()

    def come_back(self, gradient: torch.Tensor) -> None:
        """Begin the copies to where the gradient is."""
        self.back = [torch.empty_like(buffer, device=gradient.device) for buffer in self.buffers]
        self._copy(self.back, self.buffers)
        self.has_arrived = self.stream.record_event()

    def take(self, saved) -> torch.Tensor:
        """A tensor as it was saved. With its last view, a copy is no longer held here."""
        if torch.is_tensor(saved):
            return saved
        place, view = saved
        torch.cuda.current_stream().wait_event(self.has_arrived)
        whole = self.back[place]
        self.views[place] -= 1
        if self.views[place] == 0:
            self.back[place] = None
        return whole.as_strided(*view)

    def _copy(self, targets: list, sources: list) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)


def offload_layers(ways: list, kept_layers: int, keep) -> list:
    """`ways` to run each layer, where some now offload what the way `keep` keeps.

    A copy has the time of `offload_lead` layers, on its way there and back.
    """
    stream, lead = torch.cuda.Stream(), offload_lead(kept_layers)
    places = offloaded_layers(len(ways), kept_layers)
    offloaded = {index: Offloaded(keep, stream) for index in places}
    ways = [offloaded.get(index, way) for index, way in enumerate(ways)]
    for index, layer in offloaded.items():
        ways[index + lead] = partial(run_and_tell, layer, ways[index + lead])
    return ways


def run_and_tell(layer: Offloaded, run, forward, *inputs):
    """`run`, of a later layer, which tells an offloaded one when to leave and to come back."""
    output = run(forward, *inputs)
    layer.leave()
    output.register_hook(layer.come_back)
    return output
