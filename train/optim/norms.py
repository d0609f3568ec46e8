"""Norms of gradients: of one process formed as `torch.nn.utils` forms them; over many, of parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from train.parallel.mesh import Mesh
from train.parallel.placement import local


def gradient_norms(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The Euclidean norm of the gradient of each parameter that has one; scalars."""
    grads = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    if not grads:
        return {}
    return dict(zip(grads, norm_of_each(list(grads.values())), strict=True))


def norm_of_each(tensors: list[Tensor]) -> list[Tensor]:
    """Euclidean norms of one or more tensors, scalars; in float64 where float32 squares overflow,
    which those of finite gradients above 1e19 do."""
    norms = list(torch._foreach_norm(tensors))
    finite = torch.stack(norms).isfinite().all()
    if bool(finite.full_tensor() if isinstance(finite, DTensor) else finite):
        return norms
    return [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]


def total_norm(norms: list[Tensor]) -> float:
    """The norm of everything from the norms of its parts, the same on all ranks."""
    if not norms:
        return 0.0
    total = norm_of_each([torch.stack(norms)])[0]
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def shrink(parameters: Iterable[nn.Parameter], largest: float, norm: float) -> None:
    """Scale gradients of norm `norm` to `largest`; no operator takes tensors of two meshes."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
        by_mesh.setdefault(mesh, []).append(parameter)
    for some in by_mesh.values():
        nn.utils.clip_grads_with_norm_(some, largest, torch.tensor(norm))


class Norms:
    """Norms over whatever the ranks of `mesh` hold together; None: what this process holds.

    shared_elsewhere: parameters that another rank speaks for, such as the last stage's copy of tied
    token vectors.
    """

    def __init__(
        self, mesh: Mesh | None = None, shared_elsewhere: Iterable[nn.Parameter] = ()
    ) -> None:
        self._mesh = None if mesh is None or mesh.layout.plain else mesh
        self._elsewhere = set(shared_elsewhere)

    def of(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """The norm of the gradient, or of this rank's part of it, of each that has one."""
        if self._mesh is None:
            return gradient_norms(parameters)
        grads = {p: p.grad for p in parameters if p.grad is not None}
        if not grads:
            return {}
        return dict(zip(grads, norm_of_each([local(g) for g in grads.values()]), strict=True))

    def total(self, norms: dict[nn.Parameter, Tensor]) -> float:
        """The norm of everything, the same on all ranks; a collective call of all of them."""
        if self._mesh is None:
            return total_norm(list(norms.values()))
        owned = [norm for parameter, norm in norms.items() if self._owns(parameter)]
        squares = float(torch.stack(owned).double().square().sum()) if owned else 0.0
        return float(self._mesh.world.sum([squares])[0] ** 0.5)

    def _owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank speaks for its part: of those that hold the same one does."""
        assert self._mesh is not None
        if parameter in self._elsewhere:
            return False
        if not isinstance(parameter, DTensor):
            return self._mesh.owns_plain
        mesh = parameter.device_mesh
        if "replicate" not in (mesh.mesh_dim_names or ()) and self._mesh.replicas.rank > 0:
            return False
        alike = [number for number, one in enumerate(parameter.placements) if one.is_replicate()]
        return all(mesh.get_local_rank(number) == 0 for number in alike)
