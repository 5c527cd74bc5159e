"""llama.cpp as a peer, in a Python with `llama-cpp-python` and `gguf`.

Imports neither torch nor transformers. The checkpoint is converted to a GGUF file of the same type here: only the
tensor names of llama.cpp's converter are needed, and no tokenizer, because prompts are token ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from engines_peers import PREFILL_TOKENS, Clock, Generate, Prompts, Timed


@contextmanager
def llama_cpp(checkpoint: str, num_threads: int, max_streams: int, stream_tokens: int) -> Iterator[Generate]:
    """Bare batched decoding as in `llama-batched-bench`: without sampling, the next tokens are random."""
    import llama_cpp as api

    gguf = to_gguf(Path(checkpoint))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {gguf}")
    params = api.llama_context_default_params()
    params.n_seq_max = max_streams
    params.n_ctx = max_streams * stream_tokens
    params.n_threads = params.n_threads_batch = num_threads
    params.n_batch = params.n_ubatch = PREFILL_TOKENS
    context = api.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot open a context for {gguf}")
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(PREFILL_TOKENS, 0, 1)

    def decode(fed: list[tuple[int, int, int, bool]]) -> None:
        """Run one pass over tuples (token, position, stream, needs logits)."""
        batch.n_tokens = len(fed)
        for n, (token, position, stream, is_last) in enumerate(fed):
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position, 1
            batch.seq_id[n][0] = stream
            batch.logits[n] = is_last
        if api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        api.llama_synchronize(context)

    def generate(prompts: Prompts, answer_tokens: int) -> Timed:
        clock = Clock(len(prompts))
        api.llama_memory_clear(api.llama_get_memory(context), True)
        waiting: list[tuple[int, int, int, bool]] = []
        for stream, prompt in enumerate(prompts):
            fed = [(token, n, stream, n == len(prompt) - 1) for n, token in enumerate(prompt)]
            if waiting and len(waiting) + len(fed) > PREFILL_TOKENS:
                decode(waiting)
                clock.note(*(s for _, _, s, is_last in waiting if is_last))
                waiting = []
            waiting += fed
        decode(waiting)
        clock.note(*(s for _, _, s, is_last in waiting if is_last))
        rng = random.Random(0)
        for n in range(answer_tokens - 1):
            decode([(rng.randrange(vocab_size), len(p) + n, stream, True) for stream, p in enumerate(prompts)])
            clock.note(*range(len(prompts)))
        return clock.timed()

    yield generate


def to_gguf(checkpoint: Path) -> Path:
    """Convert a Qwen2 or Qwen3 checkpoint with one safetensors file; the GGUF file is its sibling."""
    import gguf

    target = checkpoint.with_name(checkpoint.name + ".gguf")
    if target.exists():
        return target
    config = json.loads((checkpoint / "config.json").read_text())
    kind = config["model_type"]
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    partial = target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(partial), kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    kinds = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(kinds[kind], config["num_hidden_layers"])
    for name, (dtype, shape, raw) in _read_safetensors(checkpoint / "model.safetensors").items():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if len(shape) == 1:  # norms and biases are applied in float32
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw
            writer.add_tensor(to, values.view(np.float32))
        elif dtype == "BF16":
            rows = raw.view(np.uint8).reshape(shape[0], shape[1] * 2)
            writer.add_tensor(to, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(to, raw.view(np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(target)


def _read_safetensors(path: Path) -> dict[str, tuple[str, list[int], np.ndarray]]:
    """Return type, shape and raw bytes of each tensor; numpy has no bfloat16."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }
