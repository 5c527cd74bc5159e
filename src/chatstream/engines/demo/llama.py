"""A Llama decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embeddings) on numpy, in float32.

Maps rows of tokens to rows of logits. The caller supplies attention through `Attend`. Gives the same logits as
`LlamaForCausalLM` of transformers for the same files, up to rounding.

One row costs about 25 numpy calls a layer, so this code minimises calls: norm weights are folded into the matrices that
follow them, matrices with a common input are concatenated, and RoPE is one complex product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class LlamaShape:
    """The fields of `config.json` that this implementation uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    context_len: int
    rope_theta: float
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_config(cls, path: Path) -> LlamaShape:
        """Read `config.json`. Raises `ValueError` if it needs a feature that is not implemented here."""
        config = json.loads(path.read_text(encoding="utf-8"))
        rope = config["rope_parameters"]
        plain = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False}
        wrong = {name for name, value in plain.items() if config.get(name, value) != value}
        if rope["rope_type"] != "default":
            wrong.add("rope_parameters")
        if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
            wrong.add("head_dim")
        if wrong:
            raise ValueError(f"{path} is not a plain Llama: {', '.join(sorted(wrong))}")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            context_len=config["max_position_embeddings"],
            rope_theta=rope["rope_theta"],
            norm_eps=config["rms_norm_eps"],
        )


class Attend(Protocol):
    """Attention in one layer. The implementation decides which positions each row sees."""

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        """`queries`: (N, heads, head_dim), rotated and scaled; `keys`, `values`: (N, kv_heads, head_dim), of the new
        positions.

        Stores the new keys and values and returns (N, heads * head_dim).
        """


class Llama:
    """The weights of one model, and its forward pass."""

    def __init__(self, shape: LlamaShape, tensors: Mapping[str, NDArray[np.floating]]) -> None:
        """`tensors` are keyed by their names in a Hugging Face checkpoint."""
        self.shape = shape
        self.embedding = _float32(tensors["model.embed_tokens.weight"])  # (vocab, hidden)
        self._layers = [_Layer(shape, tensors, f"model.layers.{n}.") for n in range(shape.num_layers)]
        self._head = _after_norm(self.embedding, tensors["model.norm.weight"])  # (hidden, vocab)
        self._rotations = _rotations(shape)

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """Load `config.json` and `model.safetensors`."""
        return cls(LlamaShape.from_config(folder / "config.json"), load_file(folder / "model.safetensors"))

    def hidden(self, token_ids: Sequence[int], positions: NDArray[np.intp], attend: Attend) -> Floats:
        """The last hidden states, before the final norm: (N, hidden). `positions`: (N,)."""
        shape = self.shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        x = self.embedding[list(token_ids)]  # (N, hidden)
        rotation = self._rotations[positions, None]  # (N, 1, head_dim / 2), complex64
        for n, layer in enumerate(self._layers):
            qkv = _times(_normed(x, shape), layer.qkv).reshape(len(x), -1, shape.head_dim)
            qkv.view(np.complex64)[:, :num_rotated] *= rotation
            queries, keys, values = (
                qkv[:, : shape.num_heads],
                qkv[:, shape.num_heads : num_rotated],
                qkv[:, num_rotated:],
            )
            x += _times(attend(n, queries, keys, values), layer.out)
            gate_up = _times(_normed(x, shape), layer.gate_up)  # (N, 2 * intermediate)
            x += _times(_swiglu(gate_up, shape.intermediate_size), layer.down)
        return x

    def logits(self, hidden: Floats) -> Floats:
        """(N, hidden) to (N, vocab)."""
        return _times(_normed(hidden, self.shape), self._head)


class _Layer:
    """The four matrices of one layer, each (in, out), ready for `x @ matrix`."""

    def __init__(self, shape: LlamaShape, tensors: Mapping[str, NDArray[np.floating]], prefix: str) -> None:
        def weight(name: str) -> Floats:
            return _float32(tensors[f"{prefix}{name}.weight"])

        query = _interleaved(weight("self_attn.q_proj"), shape.head_dim) * shape.head_dim**-0.5
        key = _interleaved(weight("self_attn.k_proj"), shape.head_dim)
        value = weight("self_attn.v_proj")
        gate_up = np.concatenate([weight("mlp.gate_proj"), weight("mlp.up_proj")])
        self.qkv = _after_norm(np.concatenate([query, key, value]), weight("input_layernorm"))
        self.out = np.ascontiguousarray(weight("self_attn.o_proj").T)
        self.gate_up = _after_norm(gate_up, weight("post_attention_layernorm"))
        self.down = np.ascontiguousarray(weight("mlp.down_proj").T)


def _float32(tensor: NDArray[np.floating]) -> Floats:
    return tensor.astype(np.float32)


def _after_norm(matrix: Floats, norm: NDArray[np.floating]) -> Floats:
    """(out, in) to (in, out), multiplied by the factors that `_normed` omits: the norm's weight and sqrt(in)."""
    scale = norm.astype(np.float32) * np.sqrt(np.float32(matrix.shape[1]))
    return np.ascontiguousarray((matrix * scale).T)


def _times(x: Floats, matrix: Floats) -> Floats:
    """`x @ matrix`; for 2 to 32 rows in blocks of columns.

    OpenBLAS computes products of up to a million multiplications directly. For larger ones it first copies the matrix
    into another order, which for few rows takes several times as long as the product.
    """
    num_rows, (num_in, num_out) = len(x), matrix.shape
    width = 1_000_000 // (num_rows * num_in)
    if width >= num_out or not 2 <= num_rows <= 32:
        whole: Floats = x @ matrix
        return whole
    product = np.empty((num_rows, num_out), np.float32)
    width -= width % 16
    for start in range(0, num_out, width):
        np.matmul(x, matrix[:, start : start + width], out=product[:, start : start + width])
    return product


def _normed(x: Floats, shape: LlamaShape) -> Floats:
    """RMSNorm (Zhang & Sennrich 2019) without its constant factor, see `_after_norm`: each row divided by its norm."""
    squares: Floats = np.einsum("nh,nh->n", x, x)
    squares += shape.hidden_size * shape.norm_eps
    normed: Floats = np.divide(x, np.sqrt(squares)[:, None])
    return normed


def _swiglu(gate_up: Floats, size: int) -> Floats:
    """silu(gate) * up (Shazeer 2020). Shape (N, 2 * size) to (N, size)."""
    gate, up = gate_up[:, :size], gate_up[:, size:]
    denominator = np.exp(-gate)
    denominator += 1.0
    gate /= denominator
    gate *= up
    return gate


def _interleaved(matrix: Floats, head_dim: int) -> Floats:
    """Reorder the rows of each head from Hugging Face's order, two halves, to adjacent pairs.

    RoPE rotates the pair (i, i + h/2); adjacent, the pair is one complex number. Queries and keys are reordered in the
    same way, so their products do not change.
    """
    halves = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _rotations(shape: LlamaShape) -> NDArray[np.complex64]:
    """RoPE (Su et al. 2021): the rotation of each pair at each position, (context_len, head_dim / 2)."""
    exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = np.outer(np.arange(shape.context_len), shape.rope_theta**-exponents)
    rotations: NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)
    return rotations
