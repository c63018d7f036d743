"""EquiformerV3: an equivariant graph transformer that gives energy, forces and stress of atoms.

Liao et al.: EquiformerV3, arXiv 2604.09130, 2026; 30 M parameters in the gradient form with lmax 4, 91 M as trained on OC20. In the gradient form
forces and stress are derivatives of the energy, so energy is conserved; in the direct form they have heads of their own. Inputs are atomic numbers,
positions in A and the edges of a neighbour list; outputs are the network's own, before any scale or element references.

Differs from the authors' code: edges close to the polar axis are differentiated too (``snap_axis`` gives theirs), the frame of an edge is not drawn
at random; and, which is exact, the two linear maps on the grid of the feed-forward are folded into those before and after it, and the grids have
the fewest points on which products are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveal.graphs3d.models.equivariant import (
    DegreeLinear,
    MergedLayerNorm,
    OrderLinear,
    RadialFunction,
    by_order,
    gated,
    gated_sphere_product,
    linear_per_degree,
    sphere_product,
    swiglu,
)
from foveal.graphs3d.models.harmonics import edge_frames, spherical_harmonics, truncation_rescale
from foveal.graphs3d.models.messages import into_frames, sum_out_of_frames
from foveal.graphs3d.models.sphere import sphere_grid
from foveal.kernels import CSR, segment_attention, segment_reduce

#: Mean number of atoms of OC20's structures: its energies are sums over atoms divided by this.
_OC20_ATOMS = 77.81317


@dataclass(frozen=True)
class EquiformerV3Config:
    """Sizes; the defaults are the gradient form trained on OMat24 with lmax 4.

    Attributes:
        direct: forces and stress by heads instead of derivatives.
        forces: give forces.
        stress: give stress.
        denoising: encode forces of corrupted atoms and predict their noise (DeNS); direct form only.
        layers: blocks.
        channels: of each degree.
        lmax: largest degree.
        mmax: largest order in the frames of edges.
        attention_hidden: channels inside the attention's values.
        heads: of attention.
        alpha_channels: a head, that make its logit.
        value_channels: a head.
        ffn_hidden: channels of the feed-forward.
        edge_channels: width of radial functions.
        radial: Gaussians of the distance.
        attention_grid: latitudes and longitudes of the authors' grid; what is computed does not depend on it, as long as it is fine enough.
        ffn_grid: the same.
        cutoff: A.
        max_neighbors: the nearest ones that a neighbour list keeps of each atom.
        max_elements: atomic numbers go below this.
        average_degree: edges an atom, that the embedding of edges is divided by.
        atoms_per_structure: the sum of atoms' energies is divided by this; None: 77.81317 without stress, as on OC20, otherwise 1.
        attention_eps: added to the softmax's sum.
        attention_dropout: of attention weights.
        drop_path: probability that a structure skips a branch, in training.
        snap_axis: as the authors' code, in the gradient form: no derivative for edges within 1.4 mrad of the polar axis.
    """

    direct: bool = False
    forces: bool = True
    stress: bool = True
    denoising: bool = False
    layers: int = 7
    channels: int = 128
    lmax: int = 4
    mmax: int = 2
    attention_hidden: int = 32
    heads: int = 8
    alpha_channels: int = 64
    value_channels: int = 16
    ffn_hidden: int = 512
    edge_channels: int = 128
    radial: int = 64
    attention_grid: tuple[int, int] = (14, 8)
    ffn_grid: tuple[int, int] = (14, 14)
    cutoff: float = 6.0
    max_neighbors: int = 300
    max_elements: int = 128
    average_degree: float = 23.395238876342773
    atoms_per_structure: float | None = None
    attention_eps: float = 1e-16
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    snap_axis: bool = False

    def __post_init__(self) -> None:
        for name in ("attention_grid", "ffn_grid"):
            object.__setattr__(self, name, tuple(int(size) for size in getattr(self, name)))
        if not 1 <= self.mmax <= self.lmax:
            raise ValueError(f"mmax must be from 1 to lmax ({self.lmax}); got {self.mmax}")
        if self.cutoff <= 0 or self.radial < 2:
            raise ValueError(f"cutoff must be positive and radial at least 2; got {self.cutoff} and {self.radial}")
        if self.direct and self.stress and self.lmax < 2:
            raise ValueError(f"a stress head needs lmax of 2 at least; got {self.lmax}")
        if self.stress and not self.forces:
            raise ValueError("stress comes with forces; got stress without forces")
        if self.denoising and not self.direct:
            raise ValueError("denoising is a head of the direct form; got denoising in the gradient form")
        sphere_grid(self.lmax, self.mmax, *self.attention_grid)
        sphere_grid(self.lmax, None, *self.ffn_grid)


class Denoising(NamedTuple):
    """What the denoising form is told besides the corrupted positions.

    Attributes:
        forces: of the uncorrupted structure, network units.
        corrupted: atoms that were moved.
        structures: structures with such atoms.
    """

    forces: Float[Tensor, "atoms 3"]
    corrupted: Bool[Tensor, " atoms"]
    structures: Bool[Tensor, " structures"]


class Prediction(NamedTuple):
    """Answer of the network.

    Attributes:
        energy: of each structure.
        forces: of each atom; of corrupted atoms their noise.
        stress: of each structure, symmetric, tensile positive as ASE's; zero where the cell has no volume.
        node_energy: each atom's part of the energy.
    """

    energy: Float[Tensor, " structures"]
    forces: Float[Tensor, "atoms 3"] | None
    stress: Float[Tensor, "structures 3 3"] | None
    node_energy: Float[Tensor, " atoms"]

    def detach(self) -> Prediction:
        """The same numbers without their graph."""
        forces, stress = (None if part is None else part.detach() for part in (self.forces, self.stress))
        return Prediction(self.energy.detach(), forces, stress, self.node_energy.detach())


class Edges(NamedTuple):
    """Edges of all structures, sorted by the atom that receives.

    Attributes:
        csr: their rows.
        source: atom that sends.
        target: atom that receives.
        source_numbers: its atomic number.
        target_numbers: its atomic number.
        radial: Gaussians of the distance.
        envelope: 1 at distance 0, 0 from the cutoff on, with three derivatives there.
        frames: Wigner matrices into the frame of the edge.
    """

    csr: CSR
    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]
    source_numbers: Int[Tensor, " edges"]
    target_numbers: Int[Tensor, " edges"]
    radial: Float[Tensor, "edges radial"]
    envelope: Float[Tensor, " edges"]
    frames: Float[Tensor, "edges kept coefficients"]

    def sum(self, messages: Float[Tensor, "edges *rest"]) -> Float[Tensor, "atoms *rest"]:
        """Sum of the messages that reach each atom."""
        return segment_reduce(messages, ptr=self.csr.indptr)


def gaussian_basis(distance: Float[Tensor, " edges"], cutoff: float, number: int) -> Float[Tensor, "edges number"]:
    """Gaussians at equal steps from 0 to the cutoff, two steps wide."""
    centers = torch.linspace(0, cutoff, number, dtype=distance.dtype, device=distance.device)
    width = 2 * cutoff / (number - 1)
    return torch.exp(-0.5 * ((distance.unsqueeze(1) - centers) / width) ** 2)


def envelope(distance: Float[Tensor, " edges"], cutoff: float) -> Float[Tensor, " edges"]:
    """1 - 21 d^5 + 35 d^6 - 15 d^7 with d = distance / cutoff, 0 from the cutoff on."""
    d = (distance / cutoff).clamp(max=1.0)
    return 1 - d**5 * (21 - 35 * d + 15 * d * d)


class EdgeInvariants(nn.Module):
    """Weights of each edge from its distance and its two elements.

    Args:
        config: sizes.
        outputs: weights.
    """

    def __init__(self, config: EquiformerV3Config, outputs: int) -> None:
        super().__init__()
        width = config.edge_channels
        self.source = nn.Embedding(config.max_elements, width)
        self.target = nn.Embedding(config.max_elements, width)
        for table in (self.source, self.target):
            nn.init.uniform_(table.weight, -0.001, 0.001)
        self.radial = RadialFunction(config.radial + 2 * width, width, outputs)

    def forward(self, edges: Edges) -> Float[Tensor, "edges outputs"]:
        """Weights."""
        return self.radial(torch.cat((edges.radial, self.source(edges.source_numbers), self.target(edges.target_numbers)), 1))


class EdgeDegreeEmbedding(nn.Module):
    """What an atom starts from besides its element: its neighbours' directions, weighted by distance and elements.

    Args:
        config: sizes.
    """

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.config = config
        self.invariants = EdgeInvariants(config, (config.lmax + 1) * config.channels)

    def forward(self, edges: Edges) -> Float[Tensor, "atoms coefficients channels"]:
        """Sum over the edges of each atom."""
        config = self.config
        along = (self.invariants(edges) * edges.envelope.unsqueeze(1)).view(-1, config.lmax + 1, config.channels)
        messages = torch.bmm(edges.frames[:, : config.lmax + 1].transpose(1, 2), along)
        rescale = truncation_rescale(config.lmax, config.mmax, messages.dtype, messages.device)
        return edges.sum(messages) * (rescale / config.average_degree).unsqueeze(1)


class GraphAttention(nn.Module):
    """Attention of each atom over its neighbours, with logits and values made in the frame of the edge from both atoms' features.

    The envelope stands inside the softmax and once more outside, so that neighbours come and go without a jump.

    Args:
        config: sizes.
        outputs: channels.
        sphere: values pass a product on the sphere; otherwise a gate, as in the heads.
    """

    def __init__(self, config: EquiformerV3Config, outputs: int, sphere: bool = True) -> None:
        super().__init__()
        self.config, self.sphere = config, sphere
        hidden, values = config.attention_hidden, config.heads * config.value_channels
        inner, scalars = (2 * hidden, 3 * hidden) if sphere else (hidden, config.lmax * hidden)
        self.split = [config.heads * config.alpha_channels, scalars]
        self.invariants = EdgeInvariants(config, (config.lmax + 1) * 2 * config.channels)
        self.mix = OrderLinear(config.lmax, config.mmax, 2 * config.channels, inner, sum(self.split))
        self.value = OrderLinear(config.lmax, config.mmax, hidden, values)
        self.logit_norm = nn.LayerNorm(config.alpha_channels)
        bound = 1 / sqrt(config.alpha_channels)
        self.logit = nn.Parameter(torch.empty(config.heads, config.alpha_channels).uniform_(-bound, bound))
        self.dropout = nn.Dropout(config.attention_dropout)
        self.project = DegreeLinear(config.lmax, values, outputs)
        if sphere:
            with torch.no_grad():
                # Degree 0 is a sum of two terms.
                self.value.zero.weight[:, :hidden] /= sqrt(2)

    def forward(self, x: Float[Tensor, "atoms coefficients channels"], edges: Edges) -> Float[Tensor, "atoms coefficients outputs"]:
        """What each atom takes from its neighbours."""
        config = self.config
        weights = self.invariants(edges).view(-1, config.lmax + 1, 2 * config.channels)
        pair = into_frames(edges.frames, x, edges.source, edges.target, edges.csr.indptr)
        # The weights are the same for all orders of a degree, so they may follow the rotation, which leaves fewer.
        zero, *pairs = by_order(pair, config.lmax, config.mmax)
        message, extra = self.mix([zero * weights, *(part * weights[:, None, m:] for m, part in enumerate(pairs, 1))])
        alpha, scalars = extra.split(self.split, 1)
        if self.sphere:
            message = gated_sphere_product(message, scalars, config.lmax, config.mmax)
        else:
            message = gated(message, scalars, config.lmax, config.mmax)
        message, _ = self.value(by_order(message, config.lmax, config.mmax))
        shares = self.dropout(self._weights(alpha, edges))
        taken = sum_out_of_frames(edges.frames, message, shares, edges.target, edges.csr.indptr)
        return self.project(taken * truncation_rescale(config.lmax, config.mmax, taken.dtype, taken.device).unsqueeze(1))

    def _weights(self, alpha: Float[Tensor, "edges channels"], edges: Edges) -> Float[Tensor, "edges heads"]:
        alpha = self.logit_norm(alpha.unflatten(1, (self.config.heads, self.config.alpha_channels)))
        # A leaky ReLU of slope 0.2 without its corner.
        alpha = 0.6 * alpha + 0.4 * alpha * (2 * torch.sigmoid(alpha) - 1)
        logits = (alpha * self.logit).sum(2)
        ones = torch.ones_like(logits).unsqueeze(2)
        options = {"edge_envelope": edges.envelope, "edge_gate": edges.envelope, "eps": self.config.attention_eps}
        return segment_attention(None, None, ones, edges.csr, edge_bias=logits, values_on_edges=True, return_weights=True, **options)[1]


class FeedForward(nn.Module):
    """A perceptron on the sphere: channels are widened, multiplied point by point, gated and narrowed; degree 0 has a SwiGLU beside.

    The linear maps on the grid act on channels alone, so they commute with going to the grid and back, and are folded into their neighbours.

    Args:
        config: sizes.
    """

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.config = config
        channels, hidden = config.channels, config.ffn_hidden
        self.expand = DegreeLinear(config.lmax, channels, hidden)
        self.scalar = nn.Linear(channels, 2 * hidden)
        self.gate = nn.Linear(channels, hidden)
        self.before = nn.Linear(hidden, 2 * hidden, bias=False)
        self.after = nn.Linear(hidden, hidden, bias=False)
        self.contract = DegreeLinear(config.lmax, hidden, channels)
        for layer in (self.scalar, self.gate):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            # Degree 0 is a sum of two terms.
            self.contract.weight[0] /= sqrt(2)

    def forward(self, x: Float[Tensor, "atoms coefficients channels"]) -> Float[Tensor, "atoms coefficients channels"]:
        """Each atom for itself."""
        config, scalar = self.config, x[:, 0]
        widened = linear_per_degree(x, self.before.weight @ self.expand.weight, self.before.weight @ self.expand.bias)
        product = sphere_product(widened, config.lmax, None) * torch.sigmoid(self.gate(scalar)).unsqueeze(1)
        out = linear_per_degree(product, self.contract.weight @ self.after.weight, self.contract.bias)
        beside = nn.functional.linear(swiglu(self.scalar(scalar)), self.contract.weight[0])
        return torch.cat((out[:, :1] + beside.unsqueeze(1), out[:, 1:]), 1)


class StressHead(nn.Module):
    """Stress of each structure: the mean over atoms of a scalar and a degree-2 output, as a symmetric matrix.

    Args:
        config: sizes.
    """

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.lmax = config.lmax
        self.expand = DegreeLinear(config.lmax, config.channels, config.ffn_hidden)
        self.gate = nn.Linear(config.channels, config.lmax * config.ffn_hidden)
        nn.init.zeros_(self.gate.bias)
        self.contract = DegreeLinear(config.lmax, config.ffn_hidden, 1)

    def forward(
        self, x: Float[Tensor, "atoms coefficients channels"], batch: Int[Tensor, " atoms"], structures: int
    ) -> Float[Tensor, "structures 3 3"]:
        """Mean over the atoms of each structure."""
        out = self.contract(gated(self.expand(x), self.gate(x[:, 0]), self.lmax, None))[:, :9, 0]
        mean = segment_reduce(out, batch, reduce="mean", num_nodes=structures)
        return symmetric_matrix(mean[:, 0], mean[:, 4:9])


def symmetric_matrix(scalar: Float[Tensor, " structures"], quadratic: Float[Tensor, "structures 5"]) -> Float[Tensor, "structures 3 3"]:
    """The symmetric matrix of a scalar and a degree-2 feature; lengths are kept."""
    xz, xy, yy, yz, zz = quadratic.unbind(1)
    trace, s, t = scalar / sqrt(3), sqrt(0.5), sqrt(1 / 6)
    xx, zz = trace - t * yy - s * zz, trace - t * yy + s * zz
    yy, xy, xz, yz = trace + 2 * t * yy, s * xy, s * xz, s * yz
    return torch.stack((xx, xy, xz, xy, yy, yz, xz, yz, zz), 1).view(-1, 3, 3)


class Block(nn.Module):
    """Attention over neighbours, then a feed-forward; each normalises first and adds to what was.

    Args:
        config: sizes.
    """

    def __init__(self, config: EquiformerV3Config) -> None:
        super().__init__()
        self.drop_path = config.drop_path
        self.attention_norm = MergedLayerNorm(config.lmax, config.channels)
        self.attention = GraphAttention(config, config.channels)
        self.feed_norm = MergedLayerNorm(config.lmax, config.channels)
        self.feed = FeedForward(config)

    def forward(
        self, x: Float[Tensor, "atoms coefficients channels"], edges: Edges, batch: Int[Tensor, " atoms"], structures: int
    ) -> Float[Tensor, "atoms coefficients channels"]:
        """One layer."""
        x = x + self._dropped(self.attention(self.attention_norm(x), edges), batch, structures)
        return x + self._dropped(self.feed(self.feed_norm(x)), batch, structures)

    def _dropped(self, branch: Tensor, batch: Tensor, structures: int) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = (torch.rand(structures, device=branch.device) >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)
        return branch * kept[batch].view(-1, 1, 1)


class EquiformerV3(nn.Module):
    """The network.

    Args:
        config: sizes.
    """

    def __init__(self, config: EquiformerV3Config | None = None) -> None:
        super().__init__()
        self.config = config = config or EquiformerV3Config()
        self.embedding = nn.Embedding(config.max_elements, config.channels)
        self.degree = EdgeDegreeEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = MergedLayerNorm(config.lmax, config.channels)
        hidden, energy = nn.Linear(config.channels, config.ffn_hidden), nn.Linear(config.ffn_hidden, 1)
        for layer in (hidden, energy):
            nn.init.zeros_(layer.bias)
        self.energy = nn.Sequential(hidden, nn.SiLU(), energy)
        self.force_head = GraphAttention(config, 1, sphere=False) if config.direct and config.forces else None
        self.stress_head = StressHead(config) if config.direct and config.stress else None
        self.force_embedding = DegreeLinear(config.lmax, 1, config.channels) if config.denoising else None
        self.denoising_head = GraphAttention(config, 1, sphere=False) if config.denoising else None

    def forward(
        self,
        numbers: Int[Tensor, " atoms"],
        positions: Float[Tensor, "atoms 3"],
        cell: Float[Tensor, "structures 3 3"],
        edge_index: Int[Tensor, "2 edges"],
        edge_offsets: Int[Tensor, "edges 3"],
        batch: Int[Tensor, " atoms"] | None = None,
        denoising: Denoising | None = None,
    ) -> Prediction:
        """Energy, forces and stress of one or more structures.

        In the gradient form forces and stress keep their graph wherever gradients are enabled, so that they can be trained on; under
        ``torch.no_grad`` or ``torch.inference_mode`` they are plain numbers.

        Args:
            numbers: atomic numbers.
            positions: A.
            cell: rows are the lattice vectors, A; zeros where there is none; (3, 3) for one structure.
            edge_index: atom that sends, atom that receives; the edge points from the receiver to the sender.
            edge_offsets: periodic image of the sender, in lattice vectors.
            batch: structure of each atom, ascending; default: all of one.
            denoising: for the denoising form, where atoms were corrupted.

        Raises:
            ValueError: shapes that do not fit, an atomic number out of range, atoms that coincide, or `denoising` for another form.
        """
        batch = torch.zeros_like(numbers) if batch is None else batch
        cell = cell.unsqueeze(0) if cell.dim() == 2 else cell
        self._check(numbers, positions, cell, edge_index, edge_offsets, batch, denoising)
        if self.config.direct or not self.config.forces:
            vectors = _vectors(positions, cell, edge_index, edge_offsets, batch)
            return self._heads(*self._features(numbers, vectors, edge_index, batch, len(cell), denoising), batch, len(cell), denoising)
        keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors made under inference mode cannot be differentiated; a copy can.
            numbers, cell, edge_index, edge_offsets, batch = (tensor.clone() for tensor in (numbers, cell, edge_index, edge_offsets, batch))
            positions = positions if positions.requires_grad and keep else positions.detach().clone().requires_grad_()
            with nullcontext() if keep else _frozen(self):
                prediction = self._gradient(numbers, positions, cell, edge_index, edge_offsets, batch, keep)
        return prediction if keep else prediction.detach()

    def _gradient(
        self, numbers: Tensor, positions: Tensor, cell: Tensor, edge_index: Tensor, edge_offsets: Tensor, batch: Tensor, keep: bool
    ) -> Prediction:
        vectors = _vectors(positions, cell, edge_index, edge_offsets, batch)
        strain = vectors.new_zeros(len(cell), 3, 3, requires_grad=True)
        if self.config.stress:
            symmetric = (strain + strain.transpose(1, 2)) / 2
            vectors = vectors + torch.bmm(vectors.unsqueeze(1), symmetric[batch[edge_index[1]]]).squeeze(1)
        x, _ = self._features(numbers, vectors, edge_index, batch, len(cell), None)
        energy, node_energy = self._energy(x, batch, len(cell))
        wanted = [positions, strain] if self.config.stress else [positions]
        slopes = torch.autograd.grad(energy.sum(), wanted, create_graph=keep, allow_unused=True, materialize_grads=True)
        stress = None
        if self.config.stress:
            volume = torch.linalg.det(cell).abs().view(-1, 1, 1)
            stress = torch.where(volume > 0, slopes[1] / torch.where(volume > 0, volume, 1.0), 0.0)
        return Prediction(energy, -slopes[0], stress, node_energy)

    def _features(
        self, numbers: Tensor, vectors: Tensor, edge_index: Tensor, batch: Tensor, structures: int, denoising: Denoising | None
    ) -> tuple[Tensor, Edges]:
        edges = self._edges(numbers, vectors, edge_index)
        x = self.degree(edges)
        scalar = self.embedding(numbers).to(x.dtype)
        x = torch.cat((x[:, :1] + scalar.unsqueeze(1), x[:, 1:]), 1)
        if denoising is not None and self.force_embedding is not None:
            x = x + self.force_embedding(self._encoded(denoising.forces)) * denoising.corrupted.view(-1, 1, 1)
        for block in self.blocks:
            x = block(x, edges, batch, structures)
        return self.norm(x), edges

    def _edges(self, numbers: Tensor, vectors: Tensor, edge_index: Tensor) -> Edges:
        config = self.config
        unsorted = CSR.from_edge_index(edge_index, len(numbers))
        order = unsorted.permutation
        csr = CSR(unsorted.indptr, unsorted.source, torch.arange(len(order), device=order.device), unsorted.num_sources)
        source, target = edge_index[:, order]
        vectors = vectors[order]
        distance = torch.linalg.vector_norm(vectors, dim=1)
        if len(distance) and not bool((distance > 1e-4).all()):
            edge = int((~(distance > 1e-4)).nonzero()[0])
            raise ValueError(
                f"atoms {int(source[edge])} and {int(target[edge])} are {distance[edge].item():.1g} A apart; expected finite positions that differ"
            )
        frames = edge_frames(vectors / distance.unsqueeze(1), config.lmax, config.mmax, config.snap_axis and not config.direct)
        radial = gaussian_basis(distance, config.cutoff, config.radial)
        return Edges(csr, source, target, numbers[source], numbers[target], radial, envelope(distance, config.cutoff), frames)

    def _encoded(self, forces: Tensor) -> Float[Tensor, "atoms coefficients 1"]:
        size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
        directions = forces / torch.where(size > 0, size, 1.0)
        return (spherical_harmonics(directions, self.config.lmax) * (size / sqrt(3))).unsqueeze(2)

    def _energy(self, x: Tensor, batch: Tensor, structures: int) -> tuple[Tensor, Tensor]:
        divisor = self.config.atoms_per_structure
        if divisor is None:
            divisor = 1.0 if self.config.stress else _OC20_ATOMS
        node_energy = self.energy(x[:, 0]).squeeze(1) / divisor
        return segment_reduce(node_energy, batch, num_nodes=structures), node_energy

    def _heads(self, x: Tensor, edges: Edges, batch: Tensor, structures: int, denoising: Denoising | None) -> Prediction:
        energy, node_energy = self._energy(x, batch, structures)
        forces = None if self.force_head is None else self.force_head(x, edges)[:, 1:4, 0]
        stress = None if self.stress_head is None else self.stress_head(x, batch, structures)
        if denoising is not None and self.denoising_head is not None:
            noise = self.denoising_head(x, edges)[:, 1:4, 0]
            forces = noise if forces is None else torch.where(denoising.corrupted.unsqueeze(1), noise, forces)
            stress = None if stress is None else stress * ~denoising.structures.view(-1, 1, 1)
        return Prediction(energy, forces, stress, node_energy)

    def _check(
        self, numbers: Tensor, positions: Tensor, cell: Tensor, edge_index: Tensor, offsets: Tensor, batch: Tensor, denoising: Denoising | None
    ) -> None:
        atoms = len(numbers)
        if positions.shape != (atoms, 3) or batch.shape != (atoms,):
            raise ValueError(f"expected positions ({atoms}, 3) and batch ({atoms},); got {tuple(positions.shape)} and {tuple(batch.shape)}")
        if cell.dim() != 3 or cell.shape[1:] != (3, 3):
            raise ValueError(f"cell must have shape (structures, 3, 3); got {tuple(cell.shape)}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2 or offsets.shape != (edge_index.shape[1], 3):
            raise ValueError(f"expected edge_index (2, edges) and edge_offsets (edges, 3); got {tuple(edge_index.shape)} and {tuple(offsets.shape)}")
        if atoms and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.config.max_elements:
            raise ValueError(f"atomic numbers must be below {self.config.max_elements}; got {int(numbers.min())} to {int(numbers.max())}")
        if denoising is not None and not self.config.denoising:
            raise ValueError("denoising inputs are for the denoising form (config.denoising); this model has no such head")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients, so that no layer keeps its input for theirs."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _vectors(positions: Tensor, cell: Tensor, edge_index: Tensor, offsets: Tensor, batch: Tensor) -> Float[Tensor, "edges 3"]:
    """From the atom that receives to the one that sends, across periodic images."""
    source, target = edge_index
    image = torch.bmm(offsets.to(cell.dtype).unsqueeze(1), cell[batch[target]]).squeeze(1)
    return positions[source] - positions[target] + image.to(positions.dtype)
