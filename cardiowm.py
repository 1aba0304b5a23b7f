"""Action-conditioned world models of the 12-lead ECG: every equation, in one file of plain PyTorch.

Paper A  Action-Conditioned Cardiac World Models (also: Beyond Patient Invariance: Learning Cardiac
         Dynamics via Action-Conditioned JEPAs), ICLR 2026 workshop on World Models.
Paper B  World Model Augmentation for Imbalanced Multi-Label ECG Classification.

Two consecutive ECGs of one patient are a transition; the change of the ICD-10 label set is the
action. An encoder and a predictor learn  state + action -> next state  in latent space:

    x, x_next  (B, C, T)   normalised ECGs             h = encoder(x)            (B, 256)
    a          (B, K)      y_next - y, in {-1, 0, 1}   z = projector(h)          (B, D)
                                                       z_pred = r([z; p(a)])     (B, D)

    L = (1 - lam) * mean((z_pred - z_next)^2) + lam * (SIGReg(z) + SIGReg(z_next))

Copy this file into your own project; it needs torch alone, touches no files and prints nothing:

    import torch, cardiowm
    x, x_next = torch.randn(2, 64, 12, 1000)                      # mV
    a = torch.randint(-1, 2, (64, 76))
    model, sigreg = cardiowm.WorldModel(num_classes=76), cardiowm.SIGReg()
    h, z, z_pred, z_next = model(cardiowm.normalize(x), cardiowm.normalize(x_next), a)
    cardiowm.dynamics_loss(z, z_pred, z_next, sigreg)["loss"].backward()

Shape letters: B batch, C leads, T samples, D embedding, S slices, Q knots, K classes,
M combinations.
"""

from __future__ import annotations

import copy
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FLAT_MV = 1e-6          # a lead whose standard deviation is at most this (mV) carries no signal
H_DIM = 256             # encoder output: bottleneck width 64 times expansion 4, in every stage
POS_WEIGHT_LIMIT = 5.0  # paper B: positives of a rare class count at most five times a negative

# ----------------------------------------------------------------------------------------------
# Input: z-score per record and lead (papers A and B)
# ----------------------------------------------------------------------------------------------


def normalize(x: Tensor) -> Tensor:
    """Z-score each lead of each record over time.

    Args:    x (B, C, T) in mV, any floating dtype.
    Returns: (B, C, T) float32, mean 0 and standard deviation 1 (ddof 0) along T; a flat lead
             (standard deviation <= 1e-6 mV) becomes exactly 0. NaN stays NaN: mend it before.
    Source:  paper A, preprocessing. Models take normalised x and never normalise themselves.
    """
    x = x.float()
    x = x - x[..., :1]  # a constant becomes exactly 0: its float32 mean need not equal it
    x = x - x.mean(dim=-1, keepdim=True)
    std = x.square().mean(dim=-1, keepdim=True).sqrt()  # (B, C, 1)
    return torch.where(std <= FLAT_MV, torch.zeros_like(x), x / std.clamp_min(FLAT_MV))


# ----------------------------------------------------------------------------------------------
# Encoder: xResNet1d50 of the ECG-benchmark lineage (He et al. 2019, arXiv:1812.01187; paper A)
# ----------------------------------------------------------------------------------------------


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    # "same" padding; no bias, since the batch norm that follows has one
    return [nn.Conv1d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm1d(c_out)]


class Bottleneck(nn.Module):
    """1x1 -> k5 (with the stride) -> 1x1, plus identity: (B, c_in, T) -> (B, c_out, T/stride)."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(
            *_conv_bn(c_in, width, 1), nn.ReLU(),
            *_conv_bn(width, width, 5, stride), nn.ReLU(),
            *_conv_bn(width, c_out, 1))
        nn.init.zeros_(self.convs[-1].weight)  # gamma = 0: each block starts as its identity path
        identity: list[nn.Module] = []
        if stride != 1:
            identity.append(nn.AvgPool1d(2, ceil_mode=True))  # keeps what a strided 1x1 would drop
        if c_in != c_out:
            identity += _conv_bn(c_in, c_out, 1)
        self.identity = nn.Sequential(*identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs(x) + self.identity(x))


class XResNet1d50(nn.Module):
    """xResNet1d50: normalised ECG (B, C, T) -> h (B, 256); 886,400 parameters at 12 leads.

    Stem of three k5 convolutions and a max pool, then stages of 3, 4, 6, 3 bottlenecks, each of
    width 64 and 256 channels (the ECG-benchmark variant; torchvision's doubles both per stage).
    Source: paper A, encoder. Assumed: Kaiming-normal convolutions, as in the xResNet lineage.
    """

    def __init__(self, in_leads: int = 12):
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(in_leads, 32, 5, 2), nn.ReLU(),
            *_conv_bn(32, 32, 5), nn.ReLU(),
            *_conv_bn(32, 64, 5), nn.ReLU(),
            nn.MaxPool1d(3, 2, 1))
        blocks, c_in = [], 64
        for depth, first_stride in zip((3, 4, 6, 3), (1, 2, 2, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(c_in, 64, H_DIM, first_stride if i == 0 else 1))
                c_in = H_DIM
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Feature map before pooling: (B, C, T) -> (B, 256, T'), T' = 32 at T=1000, 157 at 5000."""
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=-1)  # (B, 256, T') -> (B, 256)


# ----------------------------------------------------------------------------------------------
# World model: projector, action encoder, predictor (papers A and B)
# ----------------------------------------------------------------------------------------------


def _mlp(d_in: int, d_hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, d_hidden), nn.BatchNorm1d(d_hidden), nn.GELU(), nn.Linear(d_hidden, d_out))


class WorldModel(nn.Module):
    """Encoder, projector g, action encoder p and predictor r: 6,709,120 parameters at K=76.

    Args:    num_classes  K, length of the action vector
             in_leads     C
             residual     z_pred = z + MLP([z; p(a)]), paper A's text; its runs and B: plain MLP
             action       False is the naive SSL baseline: no action encoder, r sees z alone
             z_dim        D, width of z
    Source:  paper A, architecture; the prediction is made in z, as in B and in A's runs.
    Differs: A's equation writes h for the predicted state.
    """

    def __init__(self, num_classes: int = 76, in_leads: int = 12, residual: bool = False,
                 action: bool = True, z_dim: int = 256):
        super().__init__()
        self.residual = residual
        self.encoder = XResNet1d50(in_leads)
        self.projector = nn.Sequential(
            nn.Linear(H_DIM, 2048), nn.BatchNorm1d(2048), nn.GELU(),
            nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.GELU(),
            nn.Linear(2048, z_dim), nn.BatchNorm1d(z_dim))
        self.action_encoder = _mlp(num_classes, 512, 256) if action else None
        self.predictor = _mlp(z_dim + 256 if action else z_dim, 512, z_dim)

    def encode(self, x: Tensor) -> Tensor:
        """Normalised ECG (B, C, T) -> state h (B, 256), which paper A probes."""
        return self.encoder(x)

    def project(self, h: Tensor) -> Tensor:
        """State h (B, 256) -> z (B, D), where SIGReg acts, prediction happens, and B probes."""
        return self.projector(h)

    def predict(self, z: Tensor, a: Tensor | None = None) -> Tensor:
        """Next state z_pred (B, D) from z (B, D) and action a (B, K) of any dtype.

        With action=False, `a` is ignored.
        """
        if self.action_encoder is None:
            inputs = z
        else:
            inputs = torch.cat([z, self.action_encoder(a.to(z.dtype))], dim=1)  # (B, D + 256)
        step = self.predictor(inputs)
        return z + step if self.residual else step

    def forward(self, x: Tensor, x_next: Tensor, a: Tensor | None) -> tuple[Tensor, ...]:
        """Transition (B, C, T), (B, C, T), (B, K) -> h (B, 256), z, z_pred, z_next (B, D).

        The two ECGs pass the encoder in two calls, so batch norm sees each branch by itself,
        as in paper A's runs. Gradients flow through z_next: no stop-gradient, no EMA teacher.
        """
        h = self.encode(x)
        z = self.project(h)
        z_next = self.project(self.encode(x_next))
        return h, z, self.predict(z, a), z_next


# ----------------------------------------------------------------------------------------------
# SIGReg: push embeddings towards N(0, I) (LeJEPA, Balestriero & LeCun 2025, arXiv:2511.08544)
# ----------------------------------------------------------------------------------------------

# Averages a tensor over the ranks of a distributed run; its backward averages the gradients of all
# ranks in the same way, so that DDP's mean of the ranks' gradients is the gradient of the global
# loss. Its attribute `world_size` (1 where absent) is the number of ranks, all of one batch size.
# This file never imports torch.distributed.
MeanOverRanks = Callable[[Tensor], Tensor]


def _gather_mean(local_mean: Tensor, mean_over_ranks: MeanOverRanks | None) -> Tensor:
    return local_mean if mean_over_ranks is None else mean_over_ranks(local_mean)


def _waves(cos: Tensor, sin: Tensor, knots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(q v) and sin(q v) for q = 0 .. knots - 1 in turn, from cos v and sin v (N, S).

    Equal steps: cos((q + 1) v) = 2 cos(v) cos(q v) - cos((q - 1) v), and the same for sin.
    """
    twice = 2 * cos
    before, now = (torch.ones_like(cos), torch.zeros_like(sin)), (cos.clone(), sin.clone())
    yield before
    yield now
    for _ in range(knots - 2):
        for a, b in zip(before, now):
            a.neg_().addcmul_(twice, b)  # in place: what was yielded has been used
        before, now = now, before
        yield now


class _CharacteristicFunction(torch.autograd.Function):
    """mean_n exp(i t_q u_ns) at t_q = q dt: u (N, S) -> (2, Q, S), real and imaginary part.

    Autograd would keep an (N, S) tensor for each knot and operation; this keeps two in all, and
    the gradient is the textbook one: d/du mean cos(t u) = -t sin(t u) / N, of sin: t cos(t u) / N.
    """

    @staticmethod
    def forward(ctx, u: Tensor, dt: float, knots: int) -> Tensor:
        cos, sin = (u * dt).cos(), (u * dt).sin()  # the only trigonometry: 2 calls, not 2 Q
        ctx.save_for_backward(cos, sin)
        ctx.dt, ctx.knots = dt, knots
        means = [(c.mean(dim=0), s.mean(dim=0)) for c, s in _waves(cos, sin, knots)]
        return torch.stack([torch.stack(part) for part in zip(*means)])  # (2, Q, S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors                                     # (N, S) each
        t = torch.arange(ctx.knots, dtype=grad.dtype, device=grad.device) * ctx.dt
        grad_cos, grad_sin = grad * (t / len(cos))[:, None]              # (Q, S) each
        grad_u = torch.zeros_like(cos)
        for q, (c, s) in enumerate(_waves(cos, sin, ctx.knots)):
            grad_u.addcmul_(s, grad_cos[q], value=-1).addcmul_(c, grad_sin[q])
        return grad_u, None, None


def _all_knots(u: Tensor, dt: float, knots: int) -> Tensor:
    """The same as one reads it, for a GPU: there, a few large kernels cost less than many small."""
    v = u * (torch.arange(knots, device=u.device) * dt)[:, None, None]              # (Q, N, S)
    return torch.stack([v.cos().sum(dim=1), v.sin().sum(dim=1)]) / len(u)           # (2, Q, S)


class SIGReg(nn.Module):
    """Epps-Pulley statistic of random 1-D projections against the standard normal.

    With u_ns = <z_n, direction_s> and phi(t) = exp(-t^2/2), the characteristic function of N(0, 1):

        stat_s = N * integral over [-t_max, t_max] of |mean_n exp(i t u_ns) - phi(t)|^2 phi(t) dt
               ~ N * sum_q w_q * [(mean_n cos(t_q u_ns) - phi_q)^2 + (mean_n sin(t_q u_ns))^2]

    and SIGReg is the mean over s. The integrand is even, so the trapezoid runs over [0, t_max] and
    counts twice. The value scales with N: under N(0, I) its expectation is 1.05246 for any N, and
    N * 0.402048 when all embeddings are 0. It is no mean over samples: never accumulate gradients.

    Args:    slices S, knots Q, t_max
    Call:    z (N, D), N >= 1; any float dtype, computed in float32 with autocast off
             directions (D, S) unit columns; None draws S fresh ones from `generator`
             mean_over_ranks: see above; N is then the global batch size
    Returns: scalar float32
    Source:  LeJEPA, eq. of SIGReg with the Epps-Pulley test; paper A: S=256, Q=17, t_max=3.
    """

    def __init__(self, slices: int = 256, knots: int = 17, t_max: float = 3.0):
        super().__init__()
        self.slices, self.knots = slices, knots
        t = torch.linspace(0, t_max, knots, dtype=torch.float64)
        self.dt = dt = t_max / (knots - 1)
        phi = torch.exp(-t.square() / 2)
        w = torch.full_like(t, 2 * dt)  # twice: [-t_max, 0] mirrors [0, t_max]
        w[[0, -1]] = dt                 # trapezoid: half weight at both ends
        self.register_buffer("phi", phi.float()[:, None], persistent=False)              # (Q, 1)
        self.register_buffer("weights", (w * phi).float()[:, None], persistent=False)    # (Q, 1)

    def draw_directions(self, dim: int, generator: torch.Generator | None, device) -> Tensor:
        """(D, S) unit columns, uniform on the sphere, drawn on the generator's own device."""
        source = device if generator is None else generator.device
        g = torch.randn(dim, self.slices, generator=generator, device=source)
        return F.normalize(g, dim=0).to(device)

    def forward(self, z: Tensor, directions: Tensor | None = None,
                generator: torch.Generator | None = None,
                mean_over_ranks: MeanOverRanks | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if directions is None:
                directions = self.draw_directions(z.shape[1], generator, z.device)
            u = z @ directions.to(z)  # (N, D) @ (D, S) -> (N, S)
            # mean_n cos(t_q u_ns) and mean_n sin(t_q u_ns), over all ranks before they are squared
            means_of = _all_knots if u.is_cuda else _CharacteristicFunction.apply
            means = means_of(u, self.dt, self.knots)                        # (2, Q, S)
            cos, sin = _gather_mean(means, mean_over_ranks)                 # (Q, S) each
            n = z.shape[0] * getattr(mean_over_ranks, "world_size", 1)
            error = (cos - self.phi.to(u)).square() + sin.square()          # (Q, S)
            return n * (self.weights.to(u) * error).sum(dim=0).mean()


# ----------------------------------------------------------------------------------------------
# Objectives: latent dynamics with SIGReg (paper A), VICReg (Bardes et al. 2022, arXiv:2105.04906)
# ----------------------------------------------------------------------------------------------


def dynamics_loss(z: Tensor, z_pred: Tensor, z_next: Tensor, sigreg: SIGReg, lam: float = 0.1,
                  generator: torch.Generator | None = None,
                  mean_over_ranks: MeanOverRanks | None = None) -> dict[str, Tensor]:
    """L = (1 - lam) * pred + lam * (sigreg_t + sigreg_next), pred = mean((z_pred - z_next)^2).

    The invariance baseline uses it too, with the z_pred of WorldModel(action=False).

    Args:    z, z_pred, z_next (B, D); lam in [0, 1]; two independent draws of directions, z first
    Returns: dict of scalars: loss, and its terms unweighted: pred, sigreg_t, sigreg_next
    Source:  paper A, loss. SIGReg acts on encoder outputs only, never on z_pred.
    Differs: A writes a squared norm; the mean over D (A's runs, B) keeps lam = 0.1 meaningful.
    """
    with torch.autocast(z.device.type, enabled=False):
        pred = F.mse_loss(z_pred.float(), z_next.float())
        sigreg_t = sigreg(z, generator=generator, mean_over_ranks=mean_over_ranks)
        sigreg_next = sigreg(z_next, generator=generator, mean_over_ranks=mean_over_ranks)
        loss = (1 - lam) * pred + lam * (sigreg_t + sigreg_next)
    return {"loss": loss, "pred": pred, "sigreg_t": sigreg_t, "sigreg_next": sigreg_next}


def vicreg_loss(z_pred: Tensor, z_next: Tensor,
                mean_over_ranks: MeanOverRanks | None = None) -> dict[str, Tensor]:
    """loss = 25 pred + 25 var + cov, over the two branches Z in (z_pred, z_next):

        pred = mean((z_pred - z_next)^2)
        var  = 1/2 sum_Z mean_d relu(1 - sqrt(Var(Z_d) + 1e-4))
        cov  = sum_Z sum_{i != j} Cov(Z)_ij^2 / D

    Args:    z_pred, z_next (B, D), B >= 2; variances and covariances are unbiased
    Returns: dict of scalars: loss, and its terms unweighted: pred, var, cov
    Source:  VICReg, eq. 1-6 and its official coefficients; paper A, Table 3 (ablation).
    Differs: the half in var is VICReg's official code; A's runs left it out.
    """
    with torch.autocast(z_pred.device.type, enabled=False):
        z_pred, z_next = z_pred.float(), z_next.float()
        pred = F.mse_loss(z_pred, z_next)
        var, cov = 0.0, 0.0
        for z in (z_pred, z_next):
            centred = z - _gather_mean(z.mean(dim=0), mean_over_ranks)      # (B, D)
            n = z.shape[0] * getattr(mean_over_ranks, "world_size", 1)
            second = _gather_mean(centred.T @ centred / z.shape[0], mean_over_ranks)
            covariance = second * (n / (n - 1))                             # (D, D), unbiased
            variance = covariance.diagonal()
            var = var + F.relu(1 - (variance + 1e-4).sqrt()).mean() / 2
            cov = cov + (covariance.square().sum() - variance.square().sum()) / z.shape[1]
        loss = 25 * pred + 25 * var + cov
    return {"loss": loss, "pred": pred, "var": var, "cov": cov}


# ----------------------------------------------------------------------------------------------
# Classification: asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119) and heads (papers A, B)
# ----------------------------------------------------------------------------------------------


def asymmetric_loss(logits: Tensor, y: Tensor, gamma_neg: float = 4, gamma_pos: float = 1,
                    clip: float = 0.05, eps: float = 1e-8, detach: bool = False,
                    reduction: str = "sum") -> Tensor:
    """-sum[ y (1-p)^gamma_pos log p + (1-y) (1-q)^gamma_neg log q ].

    p = sigmoid(logits) and q = min(1 - p + clip, 1), the shifted probability of a negative. Easy
    negatives (p <= clip) cost nothing. gamma = 0 and clip = 0 give binary cross-entropy.

    Args:    logits (B, K); y (B, K) of 0/1, any dtype; probabilities are floored at eps in the logs
             detach: keep the focal weights out of the gradient (official option; A's runs: not)
             reduction: "sum", "mean" or "none"
    Returns: scalar float32, or (B, K) for "none"
    Source:  ASL, eq. 4-7; paper A, finetuning and linear probe.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction: found {reduction!r}, wanted 'sum', 'mean' or 'none'")
    with torch.autocast(logits.device.type, enabled=False):
        p, y = logits.float().sigmoid(), y.float()
        q = (1 - p + clip).clamp(max=1)
        weight = y * (1 - p) ** gamma_pos + (1 - y) * (1 - q) ** gamma_neg  # (B, K)
        if detach:
            weight = weight.detach()
        log_likelihood = y * p.clamp_min(eps).log() + (1 - y) * q.clamp_min(eps).log()
        loss = -weight * log_likelihood
    return {"sum": loss.sum, "mean": loss.mean, "none": lambda: loss}[reduction]()


class Classifier(nn.Module):
    """Finetuned or supervised model: encoder -> concat[max, mean] -> BN -> Dropout 0.5 -> Linear.

    Normalised ECG (B, C, T) -> logits (B, K). 926,412 parameters at 12 leads and K=76.
    Source: paper A, finetuning (the concat-pool head of the ECG-benchmark lineage).
    """

    def __init__(self, encoder: XResNet1d50, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.BatchNorm1d(2 * H_DIM), nn.Dropout(0.5), nn.Linear(2 * H_DIM, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        f = self.encoder.features(x)                                # (B, 256, T')
        return self.head(torch.cat([f.amax(dim=-1), f.mean(dim=-1)], dim=1))


class LinearProbe(nn.Module):
    """Batch norm and one linear layer on frozen embeddings: (B, dim) -> logits (B, K). Paper A."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.norm(h))


class MLPProbe(nn.Module):
    """Paper B's probe on frozen embeddings: (B, dim) -> logits (B, K).

    Linear to 512, two blocks v + Linear(GELU(Linear(LayerNorm(v)))), LayerNorm, Linear to K.
    Source: paper B, probe. Differs: B calls it a linear probe in places; it is this MLP.
    """

    def __init__(self, dim: int, num_classes: int, width: int = 512):
        super().__init__()
        self.inputs = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                          nn.Linear(width, width)) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, z: Tensor) -> Tensor:
        v = self.inputs(z)  # (B, 512)
        for block in self.blocks:
            v = v + block(v)
        return self.linear(self.norm(v))


def positive_weight(y: Tensor, limit: float = POS_WEIGHT_LIMIT) -> Tensor:
    """Weight of a positive, min(negatives / positives, limit): (N, K) of 0/1 -> (K,) float32.

    Counted on real rows. A class without positives gets 1: nothing is there to be weighted.
    Source: paper B, probe (limit 5); limit = inf is full class weighting.
    """
    positives = y.sum(dim=0, dtype=torch.float64)
    ratio = (y.shape[0] - positives) / positives.clamp_min(1)
    return torch.where(positives > 0, ratio.clamp(max=limit), 1.0).float()


def weighted_bce(logits: Tensor, y: Tensor, row_weight: Tensor, pos_weight: Tensor) -> Tensor:
    """sum_n w_n sum_k bce_nk / (K sum_n w_n): paper B's probe loss, synthetic rows with w = 0.3.

    Args:    logits, y (B, K); row_weight (B,) >= 0, not all 0; pos_weight (K,)
    Returns: scalar float32
    Source:  paper B, probe.
    """
    with torch.autocast(logits.device.type, enabled=False):
        bce = F.binary_cross_entropy_with_logits(
            logits.float(), y.float(), pos_weight=pos_weight, reduction="none")
        return (row_weight[:, None] * bce).sum() / (y.shape[1] * row_weight.sum())


# ----------------------------------------------------------------------------------------------
# Augmentation: synthesise embeddings of rare label combinations (paper B)
# ----------------------------------------------------------------------------------------------


def label_combinations(y: Tensor, max_size: int = 4, min_count: int = 50, top: int = 300,
                       normal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The exact label sets of 1 to `max_size` classes seen at least `min_count` times.

    Args:    y (N, K) of 0/1; normal (K,) bool: classes that mean "normal" (PTB-XL: NORM, SR), label
             sets within them are left out
    Returns: combinations (M, K) int64 of 0/1 and counts (M,) int64, M <= top, the most frequent
             first, equal counts in ascending lexicographic order of their rows
    Source:  paper B, target combinations. Assumed: exact sets, not subsets of sets; B's "up to
             13,000 samples" for combinations seen fewer than 100 times fits these.
    """
    rows, counts = torch.unique(y.long(), dim=0, return_counts=True)  # lexicographic order
    size = rows.sum(dim=1)
    keep = (size >= 1) & (size <= max_size) & (counts >= min_count)
    if normal is not None:
        keep &= (rows[:, ~normal.bool()] > 0).any(dim=1)
    rows, counts = rows[keep], counts[keep]
    order = torch.sort(counts, descending=True, stable=True).indices[:top]
    return rows[order], counts[order]


def allocate(counts: Tensor, total: int) -> Tensor:
    """Rows per combination, proportional to 1/count and exactly `total` in all: (M,) -> (M,) int64.

    Largest-remainder rounding; equal remainders favour the earlier combination.
    Source: paper B, n_C proportional to 1/count(C). Raises: ValueError without combinations.
    """
    if counts.numel() == 0 or int(counts.min()) < 1 or total < 0:
        raise ValueError(f"allocate: found {counts.numel()} combinations and total {total}, "
                         "wanted at least one combination, counts >= 1 and total >= 0")
    share = 1 / counts.double()
    quota = total * share / share.sum()
    allocation = quota.floor().long()
    missing = total - int(allocation.sum())
    largest = torch.sort(quota - allocation, descending=True, stable=True).indices[:missing]
    allocation[largest] += 1
    return allocation


class _Synthesis:
    """What the synthesisers share: which combination each row gets. Subclasses define `_rows`."""

    def __init__(self, combinations: Tensor, counts: Tensor, total: int):
        if combinations.shape[0] != counts.shape[0]:
            raise ValueError(f"found {combinations.shape[0]} combinations and {counts.shape[0]} "
                             "counts, wanted as many of the one as of the other")
        self.combinations = combinations.long().cpu()   # (M, K)
        self.allocation = allocate(counts.cpu(), total)  # (M,)

    def _draw(self, which: Tensor, source: tuple, generator) -> tuple[Tensor, Tensor]:
        y = self.combinations[which].float()            # (n, K)
        z = self._rows(which, y, source, generator)     # (n, D)
        return z, y.to(z.device)

    def _batches(self, source: tuple, batch_size: int, generator) -> Iterator:
        which = torch.repeat_interleave(torch.arange(len(self.allocation)), self.allocation)
        which = which[torch.randperm(len(which), generator=generator)]  # mixed
        for chunk in which.split(batch_size):
            yield self._draw(chunk, source, generator)


class Augmentor(_Synthesis):
    """World-model augmentation: z_aug = r([z_n; p(y_C - y_n)]), labelled C, from normal ECGs' z_n.

    Works on a frozen copy of the model in eval mode; the model passed in is never changed.
    Embeddings are drawn with replacement. The generator is a CPU generator.

    Args:    world_model with an action encoder; combinations (M, K) and counts (M,) as from
             label_combinations; total = rows to synthesise (paper B: 2,000,000)
    Raises:  ValueError without an action encoder, without combinations, or at another K
    Source:  paper B, world-model augmentation.
    """

    def __init__(self, world_model: WorldModel, combinations: Tensor, counts: Tensor, total: int):
        super().__init__(combinations, counts, total)
        if world_model.action_encoder is None:
            raise ValueError("world_model: found one without an action encoder (invariance "
                             "objective), wanted WorldModel(action=True)")
        wanted = world_model.action_encoder[0].in_features
        if combinations.shape[1] != wanted:
            raise ValueError(f"combinations: found {combinations.shape[1]} classes, the action "
                             f"encoder wants {wanted}")
        self.model = copy.deepcopy(world_model).eval().requires_grad_(False)

    @torch.no_grad()
    def _rows(self, which: Tensor, y: Tensor, source: tuple, generator) -> Tensor:
        z_normal, y_normal = source
        n = torch.randint(len(z_normal), (len(which),), generator=generator)    # with replacement
        action = y if y_normal is None else y - y_normal[n].to(y)               # (n, K)
        z = z_normal[n.to(z_normal.device)].float()
        return self.model.predict(z, action.to(z.device))

    def sample(self, z_normal: Tensor, n: int, generator: torch.Generator | None = None,
               y_normal: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n rows, combinations drawn in proportion to the allocation.

        Args:    z_normal (R, D), R >= 1, embeddings of normal ECGs; y_normal (R, K) their labels,
                 None where normal means no label at all
        Returns: z_aug (n, D) float32 and y_aug (n, K) float32
        """
        which = torch.multinomial(self.allocation.double(), n, True, generator=generator)
        return self._draw(which, (z_normal, y_normal), generator)

    def batches(self, z_normal: Tensor, batch_size: int, generator: torch.Generator | None = None,
                y_normal: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (z_aug, y_aug) of at most batch_size rows, exactly `allocation` rows in all."""
        return self._batches((z_normal, y_normal), batch_size, generator)


class Interpolator(_Synthesis):
    """SMOTE-style rows: z_i + u (z_j - z_i), u uniform on [0, 1), both of the same exact label set.

    z_j is one of the `neighbours` nearest of z_i within its label set; neighbours=0 copies z_i:
    plain oversampling. Same combinations and allocation as the Augmentor beside it.

    Args:    z (N, D), y (N, K): real rows, in which each combination occurs at least once
    Source:  paper B, SMOTE-style baseline (Chawla et al. 2002). Assumed: k = 5, exact label sets.
    """

    def __init__(self, z: Tensor, y: Tensor, combinations: Tensor, counts: Tensor, total: int,
                 neighbours: int = 5):
        super().__init__(combinations, counts, total)
        self.z = z.float()
        y = y.long().cpu()
        self.members = [(y == c).all(dim=1).nonzero()[:, 0] for c in self.combinations]
        if not all(len(m) for m in self.members):
            raise ValueError("combinations: found one that no row of y carries")
        self.nearest = [self._nearest(self.z[m], neighbours) for m in self.members]

    @staticmethod
    def _nearest(z: Tensor, neighbours: int) -> Tensor:
        k = min(neighbours, len(z) - 1)
        if k < 1:
            return torch.arange(len(z))[:, None]        # (n, 1): itself
        chunks = [torch.cdist(c, z).topk(k + 1, largest=False).indices for c in z.split(2048)]
        return torch.cat(chunks)[:, 1:].cpu()           # (n, k): the nearest of all is itself

    def _rows(self, which: Tensor, y: Tensor, source: tuple, generator) -> Tensor:
        out = self.z.new_empty(len(which), self.z.shape[1])
        for m in which.unique().tolist():
            rows = (which == m).nonzero()[:, 0]
            members, nearest = self.members[m], self.nearest[m]
            i = torch.randint(len(members), (len(rows),), generator=generator)
            k = torch.randint(nearest.shape[1], (len(rows),), generator=generator)
            u = torch.rand(len(rows), 1, generator=generator).to(self.z)
            z_i, z_j = self.z[members[i]], self.z[members[nearest[i, k]]]
            out[rows] = z_i + u * (z_j - z_i)
        return out

    def batches(self, batch_size: int, generator: torch.Generator | None = None
                ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (z, y) of at most batch_size rows, exactly `allocation` rows in all."""
        return self._batches((), batch_size, generator)


# ----------------------------------------------------------------------------------------------
# Beyond the papers
# ----------------------------------------------------------------------------------------------


def effective_rank(z: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of centred z (N, D): scalar, 1 to min(N-1, D).

    A collapse shows as a rank near 1. All-equal rows give 1. On CPU and in float32.
    Source: Roy & Vetterli 2007, "The effective rank".
    """
    z = z.detach().float().cpu()
    s = torch.linalg.svdvals(z - z.mean(dim=0))
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.exp(-torch.xlogy(p, p).sum())


# The action as two sets, and what makes a world model need it: ratio, windows, labels


def action_sets(y: Tensor, y_next: Tensor, known: Tensor, known_next: Tensor) -> Tensor:
    """The action as [y, y_next, known, known_next]; no change is [y, y, known, known_next].

    y_next - y tells neither 0 -> 0 from 1 -> 1 nor a code that begins from a record that nobody
    coded. A model of this form is WorldModel(num_classes=2 * K + 2).

    Args:    y, y_next (B, K) of 0/1; known, known_next (B,): the record carries codes at all
    Returns: (B, 2K + 2) float32
    """
    return torch.cat([y, y_next, known[:, None], known_next[:, None]], dim=1).float()


def ratio_to_lam(ratio: float, n: int) -> float:
    """lam with lam * n / (1 - lam) = ratio, for a global batch of n.

    SIGReg grows with n: lam = 0.1 is a ratio of 57 at the papers' n = 512 and of 7 at n = 64, two
    objectives. At a high ratio z is mostly the noise of one recording, which no action predicts.
    """
    return ratio / (n + ratio)


def crop_and_noise(x: Tensor, samples: int, noise: float,
                   generator: torch.Generator | None = None) -> Tensor:
    """A window of each record, then normal noise: against learning the recordings by heart.

    Args:    x (B, C, T) normalised; samples <= T, the same in all, each record's start uniform;
             noise, the standard deviation; generator on x's device: starts first, then noise
    Returns: (B, C, samples)
    """
    starts = torch.randint(x.shape[2] - samples + 1, (len(x), 1, 1), generator=generator,
                           device=x.device)
    at = starts + torch.arange(samples, device=x.device)                    # (B, 1, samples)
    x = x.gather(2, at.expand(-1, x.shape[1], -1))                          # (B, C, samples)
    if noise == 0:
        return x
    return x + noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def known_bce(logits: Tensor, y: Tensor, known: Tensor,
              mean_over_ranks: MeanOverRanks | None = None) -> Tensor:
    """sum_n known_n sum_k bce_nk / sum_n known_n; 0 where no record is known.

    A record without codes is unlabelled, not healthy: it teaches nothing. Summed over classes, as
    in asymmetric_loss, so that a weight means the same whatever K is.

    Args:    logits, y (B, K); known (B,) of 0/1
    Returns: scalar float32
    """
    with torch.autocast(logits.device.type, enabled=False):
        bce = F.binary_cross_entropy_with_logits(logits.float(), y.float(), reduction="none")
        known = known.float()
        count = _gather_mean(known.mean(), mean_over_ranks)  # of all ranks: some have more known
        return (known * bce.sum(dim=1)).mean() / count.clamp_min(1e-9)      # (B, K) -> (B,) -> ()


class SetAugmentor(Augmentor):
    """The Augmentor for a model of action_sets: z_aug = r([z_n; p([y_n, y_C, known_n, 1])]).

    As the Augmentor, but for `known_normal` (R,) beside y_normal: whether the normal ECG carries
    codes at all; None where all do. Raises: ValueError as there, K from 2K + 2 inputs.
    """

    def __init__(self, world_model: WorldModel, combinations: Tensor, counts: Tensor, total: int):
        _Synthesis.__init__(self, combinations, counts, total)  # the Augmentor asks for K inputs
        found = world_model.action_encoder and world_model.action_encoder[0].in_features
        wanted = 2 * combinations.shape[1] + 2
        if found != wanted:
            raise ValueError(f"world_model: found {found or 'no'} action inputs, wanted {wanted} "
                             f"for {combinations.shape[1]} classes: a model of action_sets")
        self.model = copy.deepcopy(world_model).eval().requires_grad_(False)

    @torch.no_grad()
    def _rows(self, which: Tensor, y: Tensor, source: tuple, generator) -> Tensor:
        z_normal, y_normal, known_normal = source
        n = torch.randint(len(z_normal), (len(which),), generator=generator)    # with replacement
        y_n = torch.zeros_like(y) if y_normal is None else y_normal[n].to(y)
        known = y.new_ones(len(y))
        known_n = known if known_normal is None else known_normal[n].to(known)
        z = z_normal[n.to(z_normal.device)].float()
        return self.model.predict(z, action_sets(y_n, y, known_n, known).to(z.device))

    def sample(self, z_normal: Tensor, n: int, generator: torch.Generator | None = None,
               y_normal: Tensor | None = None, known_normal: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
        which = torch.multinomial(self.allocation.double(), n, True, generator=generator)
        return self._draw(which, (z_normal, y_normal, known_normal), generator)

    def batches(self, z_normal: Tensor, batch_size: int, generator: torch.Generator | None = None,
                y_normal: Tensor | None = None, known_normal: Tensor | None = None
                ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches((z_normal, y_normal, known_normal), batch_size, generator)
