"""Window transformers: SwinIR and HAT blocks, their window attention alone, and DCTLSA's blocks.

Tokens (N, H W, C) are a channels_last image in memory: it is viewed as one, never copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sr_kernels import functional as F
from sr_kernels._batch_norm import affine
from sr_kernels.reference.window_attention import relative_position_index, shift_mask

from .elan import Act, activations, fixed_norm
from .recogniser import (
    NotRecognised,
    Recogniser,
    calls,
    is_conv,
    needs_gradient,
    register,
    runs,
    state_names,
)
from .swap import PLAIN_TENSORS

# ---------------------------------------------------------------------------------------- pieces


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, H W, C) seen as (N, C, H, W), channels_last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    """The inverse of :func:`_image`."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _kernel(linear: Any) -> Tensor:
    """A Linear's weight as that of a 1x1 convolution."""
    return linear.weight[:, :, None, None]


def _drops_paths(layer: Any) -> bool | None:
    """Whether a residual branch may be dropped in training; None: not a layer of that kind."""
    if calls(layer, nn.Identity):
        return False
    if isinstance(layer, nn.Module) and not state_names(layer) and hasattr(layer, "drop_prob"):
        return bool(layer.drop_prob)
    return None


def _no_dropout(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise NotRecognised(f"{path} drops values in training (p = {layer.p})")


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int for v in value):
        return value[0], value[1]
    return None


class _Mlp(NamedTuple):
    act: Act


def _mlps(mlp: Any) -> list[_Mlp]:
    names = state_names(mlp) if isinstance(mlp, nn.Module) else set()
    if not {"fc1", "act", "fc2"} <= names or not names <= {"fc1", "act", "fc2", "drop", "norm"}:
        raise NotRecognised("its MLP is not fc1, activation, fc2")
    if not calls(mlp.fc1, nn.Linear) or not calls(mlp.fc2, nn.Linear):
        raise NotRecognised("the layers of its MLP are not Linear")
    for extra in names - {"fc1", "act", "fc2"}:
        layer = getattr(mlp, extra)
        if not calls(layer, nn.Identity) and not isinstance(layer, nn.Dropout):
            raise NotRecognised(f"its MLP has a {type(layer).__name__}")
    found = [_Mlp(act) for act in activations(mlp.act)]
    if not found:
        raise NotRecognised(f"{type(mlp.act).__name__} in its MLP is not a known activation")
    return found


def _mlp_weights(mlp: Any) -> tuple[Any, ...]:
    return _kernel(mlp.fc1), mlp.fc1.bias, _kernel(mlp.fc2), mlp.fc2.bias


def _mlp_run(mlp: Any, found: _Mlp, image: Tensor, residual: bool) -> Tensor:
    return F.shift_conv_block(
        image,
        *_mlp_weights(mlp),
        activation=found.act.name,
        negative_slope=found.act.slope,
        residual=residual,
        pattern="none",
    )


# ------------------------------------------------------------------------------ window attention


class _Attention(NamedTuple):
    """window: (height, width).  indexed: it has its own relative_position_index; else it is given
    one with each call."""

    window: tuple[int, int]
    heads: int
    scale: float
    indexed: bool


_LAYERS = {"qkv", "proj"}
_TABLE = {"relative_position_bias_table"}
_INDEX = {"relative_position_index"}
_EMPTY = {"attn_drop", "proj_drop", "softmax"}


def _attention(module: Any) -> _Attention | None:
    """Swin's window attention; None: something else.

    Raises:
        NotRecognised: it resembles it.
    """
    names = state_names(module) if isinstance(module, nn.Module) else set()
    if not names >= _LAYERS or not isinstance(getattr(module, "num_heads", None), int):
        return None
    window = _pair(getattr(module, "window_size", None))
    if window is None:
        return None
    if "logit_scale" in names or "cpb_mlp" in names:
        raise NotRecognised("its attention is a cosine (Swin v2), for which there is no operator")
    if not names <= _LAYERS | _TABLE | _INDEX | _EMPTY or not names >= _TABLE:
        extra = names ^ (names & (_LAYERS | _TABLE | _INDEX | _EMPTY))
        raise NotRecognised(
            "its attention is not Swin's: "
            + (f"it has {', '.join(sorted(extra))}" if extra else "it has no position bias table")
        )
    part = module
    if not calls(part.qkv, nn.Linear) or not calls(part.proj, nn.Linear):
        raise NotRecognised("its qkv and proj are not Linear")
    channels, heads = part.proj.in_features, part.num_heads
    table = ((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    if (
        part.qkv.in_features != channels
        or part.qkv.out_features != 3 * channels
        or part.proj.out_features != channels
        or heads < 1
        or channels % heads
    ):
        raise NotRecognised("the widths of its qkv and proj do not fit each other")
    if tuple(part.relative_position_bias_table.shape) != table:
        raise NotRecognised("its position bias table is not that of its window")
    indexed = "relative_position_index" in names
    if indexed and not _is_index(part.relative_position_index, window):
        raise NotRecognised("its relative_position_index is not Swin's")
    if not calls(getattr(part, "softmax", nn.Softmax(-1)), nn.Softmax):
        raise NotRecognised("its softmax is another function")
    if getattr(part, "softmax", nn.Softmax(-1)).dim != -1:
        raise NotRecognised("its softmax is over another axis")
    scale = getattr(part, "scale", None)
    return _Attention(
        window,
        heads,
        float(scale if isinstance(scale, float) else (channels // heads) ** -0.5),
        indexed,
    )


def _is_index(index: Any, window: tuple[int, int]) -> bool:
    return (
        isinstance(index, Tensor)
        and index.numel() == (window[0] * window[1]) ** 2
        and torch.equal(
            index.detach().cpu().long().flatten(), relative_position_index(window).flatten()
        )
    )


def _attend(
    image: Tensor, attention: Any, found: _Attention, shift: int, residual: Tensor | None
) -> Tensor:
    """Projections, attention in windows rolled by ``shift`` with Swin's mask, residual.

    With gradients the projections are torch's: their backward is faster.
    """
    learns = needs_gradient(attention, image)
    if learns:
        qkv = nn.functional.linear(
            image.permute(0, 2, 3, 1), attention.qkv.weight, attention.qkv.bias
        ).permute(0, 3, 1, 2)
    else:
        qkv = F.shift_conv2d(image, _kernel(attention.qkv), attention.qkv.bias, pattern="none")
    q, k, v = qkv.chunk(3, 1)
    y = F.window_attention(
        q,
        k,
        v,
        window=found.window,
        shift=shift,
        num_heads=found.heads,
        scale=found.scale,
        bias=attention.relative_position_bias_table,
        mask=shift > 0,
    )
    if learns:
        y = nn.functional.linear(
            y.permute(0, 2, 3, 1), attention.proj.weight, attention.proj.bias
        ).permute(0, 3, 1, 2)
        return y if residual is None else y + residual
    return F.shift_conv2d(
        y, _kernel(attention.proj), attention.proj.bias, pattern="none", residual=residual
    )


_KNOWN_TENSORS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _known(tensor: Tensor, key: tuple[Any, ...], judge: Any) -> bool:
    """``judge()`` about this tensor; asked again once it was written to (not seen of those made in
    inference mode). False for a tensor that has no values, or none yet.
    """
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN_TENSORS or tensor.is_meta:
        return False
    state = (key, tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
    known = _KNOWN_TENSORS.get(tensor)
    if known is None or known[0] != state:
        known = (state, bool(judge()))
        _KNOWN_TENSORS[tensor] = known
    return bool(known[1])


def _is_known_index(index: Any, window: tuple[int, int]) -> bool:
    """Whether the relative_position_index that a call brings is Swin's."""
    if not isinstance(index, Tensor):
        return False
    return _known(index, ("index", window), lambda: _is_index(index, window))


def _is_mask(mask: Any, height: int, width: int, window: int, shift: int) -> bool:
    """Whether ``mask`` is Swin's, 0 or at most -100, for windows of an image of this size."""
    count = (height // window) * (width // window)
    shape = (count, window**2, window**2)
    if not isinstance(mask, Tensor) or mask.shape != shape or mask.requires_grad:
        return False

    def judge() -> bool:
        seen = shift_mask((height, width), (window, window), (shift, shift), mask.device)
        seen = seen.flatten(0, 1)
        return bool(torch.equal(mask == 0, seen)) and bool(
            (mask.masked_fill(seen, -100) <= -100).all()
        )

    return _known(mask, ("mask", height, width, window, shift), judge)


def _own_size(block: nn.Module) -> tuple[int, int] | None:
    """The size of the images for which a block has a mask: HNCT calls it resolution."""
    sizes = (_pair(getattr(block, name, None)) for name in ("input_resolution", "resolution"))
    return next((size for size in sizes if size is not None), None)


def _swin_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    seen = shift_mask((height, width), (window, window), (shift, shift)).flatten(0, 1)
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -100)


class WindowAttention(Recogniser):
    """Swin's WindowAttention by itself, on windows (N, wh ww, C); calls with a mask are left to it,
    since the windows have lost their places."""

    name = "swin_attention"
    replacement = "window_attention"
    operators = ("shift_conv2d", "window_attention")
    least = (12288, 0)

    def options(self, module: nn.Module) -> Iterable[_Attention]:
        found = _attention(module)
        if found is None:
            return []
        _no_dropout(module)
        return [found]

    def examples(self, module: nn.Module, options: _Attention) -> list[tuple[Any, ...]]:
        part: Any = module
        tokens = options.window[0] * options.window[1]
        x = torch.randn(3, tokens, part.proj.in_features, dtype=torch.float64)
        if options.indexed:
            return [(x,), (4 * x[:2], None)]
        index = relative_position_index(options.window)
        return [(x, index), (4 * x[:2], index, None)]

    def forward(self, module: nn.Module, options: _Attention, *args: Any) -> Any:
        part: Any = module
        extra = list(args[1:])
        if not options.indexed and extra:
            index = extra.pop(0)
            if not _is_known_index(index, options.window):
                return NotImplemented
        elif not options.indexed:
            return NotImplemented
        if len(extra) > 1 or (extra and extra[0] is not None):
            return NotImplemented
        x = args[0]
        if not runs(self.operators, x, part.qkv.weight, part.relative_position_bias_table):
            return NotImplemented
        height, width = options.window
        if x.dim() != 3 or x.shape[1:] != (height * width, part.qkv.weight.shape[1]):
            return NotImplemented
        return _tokens(_attend(_image(x, height, width), part, options, 0, None)).contiguous()


# ----------------------------------------------------------------------------------------- block


class _Block(NamedTuple):
    """hybrid: HAT's, with a convolution branch."""

    attention: _Attention
    shift: int
    mlp: _Mlp
    drops: bool
    hybrid: bool


class SwinBlock(Recogniser):
    """SwinTransformerBlock of SwinIR and HAT's HAB."""

    name = "swin_block"
    replacement = "window_attention + shift_conv2d + shift_conv_block"
    operators = ("shift_conv2d", "window_attention", "shift_conv_block")
    least = (16384, 16384)

    def options(self, module: nn.Module) -> Iterable[_Block]:
        part: Any = module
        names = state_names(module) - {"attn_mask"}
        if not {"norm1", "attn", "norm2", "mlp"} <= names:
            return []
        shift, window = getattr(part, "shift_size", None), getattr(part, "window_size", None)
        if _pair(shift) is None or _pair(window) is None:
            return []
        attention = _attention(part.attn)
        if attention is None:
            return []
        if (
            type(shift) is not int
            or type(window) is not int
            or attention.window != (window, window)
        ):
            raise NotRecognised("its windows are not square, or not those of its attention")
        extra = names - {"norm1", "attn", "norm2", "mlp", "drop_path", "conv_block"}
        if extra:
            raise NotRecognised(f"a Swin block has no {', '.join(sorted(extra))}")
        channels = part.attn.proj.in_features
        for norm in (part.norm1, part.norm2):
            if not calls(norm, nn.LayerNorm) or norm.normalized_shape != (channels,):
                raise NotRecognised("its norms are not LayerNorm over the channels")
        drops = _drops_paths(part.drop_path) if "drop_path" in names else False
        if drops is None:
            raise NotRecognised(f"its drop_path is a {type(part.drop_path).__name__}")
        _no_dropout(module)
        if not 0 <= shift < window:
            raise NotRecognised(f"its windows of {window} are shifted by {shift}")
        mask, own = module._buffers.get("attn_mask"), _own_size(module)
        if mask is not None and (own is None or not _is_mask(mask, *own, window, shift)):
            raise NotRecognised("its attn_mask is not Swin's for the image size that it names")
        hybrid = "conv_block" in names
        if hybrid and not isinstance(getattr(part, "conv_scale", None), (int, float)):
            raise NotRecognised("its convolution branch has no constant conv_scale")
        return [_Block(attention, shift, mlp, drops, hybrid) for mlp in _mlps(part.mlp)]

    def examples(self, module: nn.Module, options: _Block) -> list[tuple[Any, ...]]:
        part: Any = module
        channels, window = part.attn.proj.in_features, options.attention.window[0]
        found: list[tuple[Any, ...]] = []
        for number, (rows, columns) in ((2, (2, 3)), (1, (2, 2))):
            size = (rows * window, columns * window)
            x = (3 - number) * torch.randn(number, size[0] * size[1], channels, dtype=torch.float64)
            extra: tuple[Any, ...] = ()
            if not options.attention.indexed:
                extra = (
                    relative_position_index(options.attention.window),
                    _swin_mask(*size, window, max(options.shift, window // 2)),
                )
            found.append((x, size, *extra))
        mask = module._buffers.get("attn_mask")
        own = _own_size(module)
        if mask is not None and own is not None and own[0] * own[1] <= 32 * 32:
            # The size at which it takes its own mask; at larger ones the mask alone is looked at.
            found.insert(0, (torch.randn(1, own[0] * own[1], channels, dtype=torch.float64), own))
        return found

    def forward(self, module: nn.Module, options: _Block, *args: Any) -> Any:
        part: Any = module
        attention = options.attention
        if len(args) != (2 if attention.indexed else 4):
            return NotImplemented
        x, size = args[0], args[1]
        if options.drops and module.training:
            return NotImplemented
        table = part.attn.relative_position_bias_table
        if not runs(self.operators, x, part.attn.qkv.weight, table, part.norm1.weight):
            return NotImplemented
        if torch.is_autocast_enabled(x.device.type):
            return NotImplemented  # LayerNorm's dtype differs between devices
        if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2 or x.dim() != 3:
            return NotImplemented
        height, width = size
        window, shift = attention.window[0], options.shift
        if height % window or width % window or x.shape[1] != height * width or x.shape[1] == 0:
            return NotImplemented
        if not attention.indexed:
            if not _is_known_index(args[2], attention.window):
                return NotImplemented
            if shift > 0 and not _is_mask(args[3], height, width, window, shift):
                return NotImplemented
        normed = _image(part.norm1(x), height, width)
        y = _attend(normed, part.attn, attention, shift, _image(x, height, width))
        y = _tokens(y)
        if options.hybrid:
            y = y + _tokens(part.conv_block(normed)) * part.conv_scale
        z = part.norm2(y)
        if needs_gradient(module, x):  # torch's projections have the faster backward
            return y + part.mlp.fc2(part.mlp.act(part.mlp.fc1(z)))
        z = _image(z, height, width)
        return y + _tokens(_mlp_run(part.mlp, options.mlp, z, residual=False))


# ---------------------------------------------------------------------------------------- DCTLSA


class _Linear(NamedTuple):
    window: int
    heads: int
    scale: float
    shift: int
    mlp: _Mlp


_LOCAL = [
    ("pointwise_prenorm_0", nn.BatchNorm2d),
    ("pointwise_conv_0", nn.Conv2d),
    ("depthwise_conv", nn.Conv2d),
    ("pointwise_prenorm_1", nn.BatchNorm2d),
    ("pointwise_conv_1", nn.Conv2d),
]


class LinearWindowBlock(Recogniser):
    """DCTLSA's block: a local branch, window attention without a softmax over pairs
    (``q (softmax_tokens(k)^T v)``), and an MLP. Training is left to the module itself. With
    gradients and on a GPU the parts of linear_attention_block run one by one."""

    name = "linear_window_block"
    replacement = "linear_attention_block + shift_conv_block"
    operators = ("shift_conv2d", "shift_conv_block")

    def options(self, module: nn.Module) -> Iterable[_Linear]:
        part: Any = module
        if state_names(module) != {"attn", "mlp"}:
            return []
        attention = part.attn
        if not state_names(attention) >= {"qkv", "proj", "local"}:
            return []
        if state_names(attention) - _EMPTY != {"qkv", "proj", "local"}:
            raise NotRecognised("its attention is not DCTLSA's")
        _no_dropout(module)
        window = _pair(getattr(attention, "window_size", None))
        shift = getattr(part, "shift_size", None)
        heads = getattr(attention, "num_heads", None)
        local = attention.local
        if window is None or type(shift) is not int or type(heads) is not int:
            raise NotRecognised("it does not say its window, shift and heads")
        if window[0] != window[1] or heads < 1:
            raise NotRecognised("its windows are not square")
        if (
            not calls(local, nn.Sequential)
            or [(name, kind) for name, kind in _LOCAL if calls(local._modules.get(name), kind)]
            != list(_LOCAL)
            or len(local) != len(_LOCAL)
        ):
            raise NotRecognised("its local branch is not DCTLSA's")
        channels = attention.qkv.in_features if calls(attention.qkv, nn.Linear) else 0
        if (
            channels == 0
            or channels % heads
            or attention.qkv.out_features != 3 * channels
            or not calls(attention.proj, nn.Linear)
            or (attention.proj.in_features, attention.proj.out_features) != (channels, channels)
            or not is_conv(local.pointwise_conv_0, 1)
            or not is_conv(local.depthwise_conv, 3, groups=channels)
            or not is_conv(local.pointwise_conv_1, 1)
            or local.pointwise_prenorm_0.num_features != channels
            or local.pointwise_prenorm_1.num_features != channels
        ):
            raise NotRecognised("its layers do not fit each other")
        scale = getattr(attention, "scale", None)
        if not isinstance(scale, (int, float)):
            raise NotRecognised("its scale is not a number")
        return [_Linear(window[0], heads, float(scale), shift, mlp) for mlp in _mlps(part.mlp)]

    def examples(self, module: nn.Module, options: _Linear) -> list[tuple[Any, ...]]:
        part: Any = module
        channels, side = part.attn.qkv.in_features, options.window
        return [
            (torch.randn(2, 6 * side * side, channels, dtype=torch.float64), (2 * side, 3 * side)),
            (4 * torch.randn(1, 2 * side * side, channels, dtype=torch.float64), (2 * side, side)),
        ]

    def forward(self, module: nn.Module, options: _Linear, *args: Any) -> Any:
        part: Any = module
        attention, local = part.attn, part.attn.local
        if len(args) != 2:
            return NotImplemented
        x, size = args
        if not runs(self.operators, x, attention.qkv.weight) or x.dim() != 3:
            return NotImplemented
        if torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        if not (fixed_norm(local.pointwise_prenorm_0) and fixed_norm(local.pointwise_prenorm_1)):
            return NotImplemented
        if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
            return NotImplemented
        height, width = size
        if height % options.window or width % options.window:
            return NotImplemented
        if x.shape[1] != height * width or x.shape[1] == 0:
            return NotImplemented
        shift = options.shift
        first = _norm_first(local.pointwise_prenorm_0, local.pointwise_conv_0)
        last = _norm_first(local.pointwise_prenorm_1, local.pointwise_conv_1)
        if runs(("linear_attention_block",), x) and not needs_gradient(module, x):
            image = _image(x.contiguous(), height, width)
            y = _linear_attention_block(image, first, last, attention, options)
            return _tokens(_mlp_run(part.mlp, options.mlp, y, residual=True))
        grid = x.unflatten(1, (height, width))
        if shift:
            grid = torch.roll(grid, (-shift, -shift), (1, 2))
        image = grid.permute(0, 3, 1, 2)
        y = local.depthwise_conv(F.shift_conv2d(image, *first, pattern="none"))
        y = F.shift_conv2d(y, *last, pattern="none", residual=image)
        y = _linear_attention(y.permute(0, 2, 3, 1), attention, options)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        return _tokens(_mlp_run(part.mlp, options.mlp, y.permute(0, 3, 1, 2), residual=True))


def _norm_first(norm: Any, convolution: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution with the BatchNorm in front of it, in eval mode."""
    factor, offset = affine(norm, norm.running_mean, norm.running_var)
    matrix = convolution.weight[:, :, 0, 0]
    bias = matrix @ offset
    if convolution.bias is not None:
        bias = bias + convolution.bias
    return convolution.weight * factor[None, :, None, None], bias


def _linear_attention_block(
    image: Tensor,
    first: tuple[Tensor, Tensor],
    last: tuple[Tensor, Tensor],
    attention: Any,
    options: _Linear,
) -> Tensor:
    """All but the MLP. first, last: the 1x1 convolutions of the local branch, from _norm_first."""
    depthwise = attention.local.depthwise_conv
    weight, bias = last
    if depthwise.bias is not None:
        bias = bias + weight[:, :, 0, 0] @ depthwise.bias
    return F.linear_attention_block(
        image,
        *first,
        depthwise.weight,
        weight,
        bias,
        _kernel(attention.qkv),
        attention.qkv.bias,
        _kernel(attention.proj),
        attention.proj.bias,
        window=options.window,
        shift=options.shift,
        num_heads=options.heads,
        scale=options.scale,
    )


def _linear_attention(image: Tensor, attention: Any, options: _Linear) -> Tensor:
    """(N, H, W, C) -> (N, H, W, C): ``x + proj(scale q (softmax_tokens(k)^T v))`` in windows.

    With K the softmax and X a window's tokens, K^T v = K^T X W_v^T + b_v, since the weights of a
    softmax add up to one; so all that is per window is one C x C matrix, through which X goes once:
    q and v are never formed. The bias of k adds one number to all tokens, which a softmax ignores.
    """
    n, height, width, channels = image.shape
    side = options.window
    grid = (n, height // side, width // side)
    x = image.reshape(n, grid[1], side, grid[2], side, channels)
    x = x.transpose(2, 3).reshape(-1, side * side, channels)
    w_q, w_k, w_v = attention.qkv.weight.split(channels)
    many = x.shape[0]
    k = torch.bmm(w_k.expand(many, -1, -1), x.transpose(1, 2))
    state = torch.bmm(k.softmax(-1), x)
    state = state @ w_v.t()
    if attention.qkv.bias is not None:
        state = state + attention.qkv.bias[2 * channels :]
    head = torch.arange(channels, device=x.device) // (channels // options.heads)
    same = (head[:, None] == head[None, :]).to(x.dtype) * options.scale
    state = (state * same) @ attention.proj.weight.t()
    offset = attention.proj.bias
    if attention.qkv.bias is not None:
        shifted = (attention.qkv.bias[:channels] @ state)[:, None]
        offset = shifted if offset is None else shifted + offset
    matrix = w_q.t() @ state + torch.eye(channels, dtype=x.dtype, device=x.device)
    out = torch.bmm(x, matrix) if offset is None else torch.baddbmm(offset, x, matrix)
    return out.reshape(*grid, side, side, channels).transpose(2, 3).reshape(image.shape)


for _recogniser in (WindowAttention(), SwinBlock(), LinearWindowBlock()):
    register(_recogniser)
