"""PyTorch's side of `benchmarks.step`: CMD on transformers' ViT as a user of DINO's and EsViT's loops would write it.

Serves training steps on fixed random crops (`benchmarks.timing`): teacher and student forward (global and local crops in
passes of their own), loss, backward, clipping per parameter, AdamW, EMA and centers. Stochastic depth is off and the last layer
is never frozen.
"""

import argparse
import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # as everybody calls it
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks import timing
from benchmarks.torch_loss import METHODS, Encoded, Levels, TermWeights, cmd_loss

LAYER_NORM_EPS = 1e-6
CLIP_GRAD = 3.0
LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.04
TEACHER_MOMENTUM = 0.996
MIL_HIDDEN_DIM = 128

# Width, blocks, heads and patch side; "micro" is for tests.
VITS = {"vit_micro": (96, 2, 3, 8), "vit_tiny": (192, 12, 3, 16), "vit_small": (384, 12, 6, 16)}


class ViT(nn.Module):
    """[B, 3, H, W] -> class token [B, D] and patches [B, N, D] after the final norm."""

    def __init__(self, name: str, global_px: int) -> None:
        super().__init__()
        self.width, depth, heads, patch = VITS[name]
        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * self.width,
            patch_size=patch,
            image_size=global_px,
            layer_norm_eps=LAYER_NORM_EPS,
            attn_implementation="sdpa",
        )
        self.model, self.global_px = ViTModel(config, add_pooling_layer=False), global_px

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        interpolate = images.shape[-1] != self.global_px
        tokens = self.model(images, interpolate_pos_encoding=interpolate).last_hidden_state
        return tokens[:, 0], tokens[:, 1:]


class Head(nn.Module):
    """DINO's head: three linear layers with GELU to an l2-normalised bottleneck, and K unit rows."""

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.weight_v = nn.Parameter(torch.randn(prototypes, bottleneck) * bottleneck**-0.5)

    def rows(self) -> Tensor:
        """W, [K, d]."""
        return F.normalize(self.weight_v, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> z [..., d]."""
        return F.normalize(self.mlp(x), dim=-1)


class Scorer(nn.Module):
    """Gated attention: [B, N, D] patches -> [B, N] MIL weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tanh, self.sigmoid = (nn.Linear(width, MIL_HIDDEN_DIM, bias=False) for _ in range(2))
        self.out = nn.Linear(MIL_HIDDEN_DIM, 1, bias=False)
        nn.init.trunc_normal_(self.out.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.out(torch.tanh(self.tanh(tokens)) * torch.sigmoid(self.sigmoid(tokens))).squeeze(-1)
        return F.softmax(scores, dim=-1, dtype=torch.float32)


class Network(nn.Module):
    """Backbone and heads of a student or a teacher; method "dino" has no region level."""

    def __init__(self, model: str, method: str, prototypes: int, global_px: int) -> None:
        super().__init__()
        self.backbone = ViT(model, global_px)
        self.image_head = Head(self.backbone.width, prototypes)
        self.regions = method == "cmd"
        if self.regions:
            self.region_head = Head(self.backbone.width, prototypes)
            self.scorer = Scorer(self.backbone.width)

    def prototypes(self) -> Levels:
        """The rows of both levels."""
        return Levels(self.image_head.rows(), self.region_head.rows() if self.regions else None)

    def forward(self, groups: list[Tensor], batch: int) -> Encoded:
        """groups: crops of one size each, [V * B, 3, H, W] crop-major; one pass of the backbone each, one of the heads."""
        pooled, regions, features, mil_weights = [], [], [], []
        for crops in groups:
            image, patches = self.backbone(crops)
            if self.regions:
                weights = self.scorer(patches)
                image = torch.einsum("bn,bnd->bd", weights, patches)
                regions.append(patches.flatten(0, 1))
                features += patches.split(batch)
                mil_weights += weights.split(batch)
            pooled.append(image)
        image_z = self.image_head(torch.cat(pooled))
        if not self.regions:
            return Encoded(image_z)
        return Encoded(image_z, self.region_head(torch.cat(regions)), tuple(features), tuple(mil_weights))


def clip_per_parameter(parameters: list[nn.Parameter], max_norm: float) -> None:
    """DINO's clipping: every gradient on its own; one transfer of all norms instead of one each."""
    norms = torch.stack([torch.linalg.vector_norm(parameter.grad) for parameter in parameters])
    for parameter, factor in zip(parameters, (max_norm / (norms + 1e-6)).tolist(), strict=True):
        if factor < 1.0:
            parameter.grad.mul_(factor)


def loss_of(
    student: Network,
    teacher: Network,
    groups: list[Tensor],
    batch: int,
    centers: Levels,
    weights: TermWeights,
    autocast: Callable[[], torch.autocast],
) -> tuple[Tensor, Levels]:
    """The loss of the crops and the new centers; the teacher sees the first group, the global crops."""
    with autocast():
        with torch.no_grad():
            taught = teacher(groups[:1], batch)
            teacher_prototypes = teacher.prototypes()
        # the patches that L_T weighs: its gradient ends in the scorer
        inter_teacher_weights = tuple(student.scorer(features) for features in taught.features)
        loss, _, centers = cmd_loss(
            student(groups, batch),
            student.prototypes(),
            taught,
            teacher_prototypes,
            inter_teacher_weights,
            centers,
            weights=weights,
        )
    return loss, centers


class Training:
    """Student, teacher, optimizer, centers and fixed crops; `step()` trains once and returns the loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        """args: of `parser`."""
        torch.manual_seed(0)
        device, weights = torch.device(args.device), METHODS[args.method]
        self.student = Network(args.model, args.method, args.prototypes, args.global_px).to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.parameters = list(self.student.parameters())
        decayed, plain = ([p for p in self.parameters if (p.ndim >= 2) == matrix] for matrix in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}], lr=LEARNING_RATE
        )
        zeros = lambda: torch.zeros(args.prototypes, device=device)
        self.centers = Levels(zeros(), zeros() if args.method == "cmd" else None)
        sizes = [(2, args.global_px), (args.local_count, args.local_px)]
        groups = [torch.randn(count * args.batch_size, 3, px, px, device=device) for count, px in sizes if count]
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
        loss = torch.compile(loss_of) if args.compile else loss_of
        self._loss = functools.partial(loss, groups=groups, batch=args.batch_size, weights=weights, autocast=autocast)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(self) -> float:
        """One update of everything, finished when it returns."""
        loss, self.centers = self._loss(self.student, self.teacher, centers=self.centers)
        self.optimizer.zero_grad()
        loss.backward()
        clip_per_parameter(self.parameters, CLIP_GRAD)
        self.optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.teacher.parameters(), self.parameters, strict=True):
                mean.lerp_(parameter, 1.0 - TEACHER_MOMENTUM)
        self._wait()
        return loss.item()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_step", description=__doc__)
    add = parser.add_argument
    add("--model", choices=list(VITS), required=True, help="backbone of transformers, random weights")
    add("--method", choices=list(METHODS), required=True, help="dino: L_I on the class token")
    add("--batch_size", type=int, required=True, help="images")
    add("--prototypes", type=int, required=True, help="K")
    add("--local_count", type=int, required=True, help="local crops of an image, beside its two global ones")
    add("--global_px", type=int, required=True)
    add("--local_px", type=int, required=True)
    add("--dtype", choices=["float32", "bfloat16"], required=True, help="bfloat16 is autocast")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    add("--compile", action="store_true", help="torch.compile of both networks and the loss")
    return parser


def _device_peak() -> dict:
    """Peak of the allocator since the last call."""
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"device_peak_bytes": peak}


def main() -> None:
    """Runs the command line."""
    args = parser().parse_args()
    replies = timing.claim_stdout()
    torch.set_num_threads(1)
    training = Training(args)
    info = {
        "parameters": sum(parameter.numel() for parameter in training.parameters),
        "loss": training.step(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        info["device"] = torch.cuda.get_device_name()
    timing.serve(training.step, info, replies, _device_peak if args.device == "cuda" else dict)


if __name__ == "__main__":
    main()
