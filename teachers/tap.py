"""Feature maps from inside a network, without computing anything after the last of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class LastLayerReached(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


def first_tensor(output: Any) -> Any:
    """A module's feature map: some modules return a map, others a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


class Tap:
    """Runs a network up to the last requested layer, and keeps the requested layers' outputs.

    It uses hooks, of which the last raises an exception, so that it works with unchanged networks
    and `torch.compile` sees a graph that ends there. Outside of a call the network behaves as
    usual.

    Args:
        network: hooks are put on its modules, once.
        layers: names of modules that run once in a forward pass.
        last: the one of them that finishes last.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], last: str) -> None:
        self._layers = tuple(layers)
        self._outputs: dict[str, Any] = {}
        self._running = self._early = False
        # Such a module may write over the output of the layer before it.
        self._copies = any(getattr(module, "inplace", False) for module in network.modules())
        for name in layers:
            network.get_submodule(name).register_forward_hook(self._keep(name, name == last))

    def __call__(self, forward: Callable[[], Any], early_exit: bool = True) -> list[Any]:
        """The layers' raw outputs, in their order, from a `forward` that runs the network once, to
        its end without `early_exit`."""
        self._outputs, self._running, self._early = {}, True, early_exit
        try:
            forward()
        except LastLayerReached:
            pass
        finally:
            self._running = False
        outputs, self._outputs = self._outputs, {}
        return [outputs[name] for name in self._layers]

    def _keep(self, name: str, last: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._running:
                self._outputs[name] = output
                if last and self._early:
                    raise LastLayerReached
                if self._copies:
                    self._outputs[name] = _copied(output)

        return hook


def _copied(output: Any) -> Any:
    """A tensor's copy, or a tuple of copies; anything else as it is."""
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output
