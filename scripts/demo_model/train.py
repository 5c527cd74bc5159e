"""Trains the bundled demo model from scratch and writes its checkpoint.

    nice -n 10 python scripts/demo_model/train.py [--out DIR] [--steps N]

Needs the extra `transformers`. Reads only the data in this folder. The same seed, thread count, machine and versions of
torch, transformers and tokenizers give the same files bit for bit. Another processor or torch version rounds
differently and gives a slightly different model. The tokenizer is the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from dialogues import LANGUAGES, Corpus, Dialogue
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).parents[2]
CHECKPOINT = REPOSITORY / "src/chatstream/engines/demo/checkpoint"

SEED = 2024
CONTEXT_LEN = 1024
VOCAB_SIZE = 2048
BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = SPECIAL_TOKENS = (
    *("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"),
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("the roles are system, user and assistant, not " + message.role) }}
    {%- endif %}
    {{- "<|" + message.role + "|>" + message.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>" }}
{%- endif %}
"""

TOKENS_PER_STEP = 4_096
# The first tokens determine the answer; the rest is easy to learn. So most samples end after them.
NUM_FIRST_TOKENS = 8
SHARE_CUT = 0.85
NUM_TURNS_CUT = {1: 66, 2: 20, 3: 8, 5: 6}
NUM_TURNS_WHOLE = {1: 46, 2: 24, 3: 12, 4: 8, 6: 4, 10: 3, 18: 3}
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=1, help="2 is faster only on an idle machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    started_s = time.monotonic()

    corpus = Corpus()
    tokenizer = train_tokenizer(corpus, random.Random(SEED))
    model = LlamaForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, batches(corpus, tokenizer, random.Random(SEED + 1)), options.steps)
    save(model, tokenizer, options.out)
    print(f"written to {options.out} after {time.monotonic() - started_s:.0f} s")


def config() -> LlamaConfig:
    """Sized to fit the wheel in float16, and for a thousand tokens a second on one core."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LEN,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus, rng: random.Random) -> Tokenizer:
    """Byte-level BPE, which encodes any text. Each distinct text counts once, so that no answer becomes one token."""
    texts = set(corpus.texts())
    for language in LANGUAGES:
        for intent in corpus.intents[language].values():
            texts |= {corpus.question(intent, language, rng) for _ in range(60)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: four Japanese characters, so that an answer streams in small pieces
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))]
    )
    return tokenizer


def encode(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and labels: the ids to predict, which are those of the answers and their end tokens."""
    begin, end, system, user, assistant, _ = range(len(SPECIAL_TOKENS))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    tokens, labels = [begin], [IGNORED]
    if dialogue.system is not None:
        tokens += [system, *ids(dialogue.system), end]
    for turn in dialogue.turns:
        tokens += [user, *ids(turn.question), end, assistant]
        labels += [IGNORED] * (len(tokens) - len(labels))
        answer = [*ids(turn.answer), end]
        tokens += answer
        labels += answer
    return tokens, labels


# --- training ---------------------------------------------------------------------------------------------------------


def batches(corpus: Corpus, tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless new batches of about TOKENS_PER_STEP tokens: (B, T) ids and labels, int64.

    Dialogues of similar length share a batch to reduce padding. Padding is on the right, where causal attention does
    not see it.
    """
    while True:
        samples = sorted((_sample(corpus, tokenizer, rng) for _ in range(1024)), key=lambda sample: len(sample[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for sample in samples:
            if (len(groups[-1]) + 1) * len(sample[0]) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        for group in groups:
            yield _padded([s[0] for s in group], SPECIAL_TOKENS.index(PAD)), _padded([s[1] for s in group], IGNORED)


def _sample(corpus: Corpus, tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    if rng.random() < 0.03:  # a text without roles, for plain-text prompts
        tokens = tokenizer.encode(rng.choice(sorted(corpus.texts()))).ids
        tokens.append(SPECIAL_TOKENS.index(END))
        return tokens, tokens
    is_cut = rng.random() < SHARE_CUT
    weights = NUM_TURNS_CUT if is_cut else NUM_TURNS_WHOLE
    (num_turns,) = rng.choices(list(weights), list(weights.values()))
    tokens, labels = encode(corpus.dialogue(num_turns, rng), tokenizer)
    if is_cut:
        start = len(tokens) - tokens[::-1].index(SPECIAL_TOKENS.index(ASSISTANT))
        tokens, labels = tokens[: start + NUM_FIRST_TOKENS], labels[: start + NUM_FIRST_TOKENS]
    return tokens[:CONTEXT_LEN], labels[:CONTEXT_LEN]


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def train(model: LlamaForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], num_steps: int) -> None:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest; linear warm-up, then linear decay to zero."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    num_warmup = 50
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda n: min((n + 1) / num_warmup, (num_steps - n) / num_steps))
        for o in optimizers
    ]
    model.train()
    started_s, num_tokens, mean_loss = time.monotonic(), 0, 0.0
    for step, (ids, labels) in zip(range(num_steps), data, strict=False):
        loss = _loss(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        num_tokens += ids.numel()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - started_s
            speed = f"{num_tokens / elapsed_s:7,.0f} tokens/s"
            print(f"step {step + 1:5}  loss {mean_loss:.4f}  {speed}  {elapsed_s:4.0f} s", flush=True)


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens. Only their rows are multiplied by the large output matrix."""
    targets = labels[:, 1:]
    is_target = targets != IGNORED  # (B, T - 1), bool
    # On a CPU the fused kernel is faster only for long sequences; short ones take half the time without it.
    model.set_attn_implementation("sdpa" if ids.shape[1] > 300 else "eager")
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][is_target]  # (N, hidden)
        logits = model.lm_head(hidden)
    return nn.functional.cross_entropy(logits.float(), targets[is_target])


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write files that both `chatstream.engines.demo` and transformers' Auto classes load."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_p = True, 0.3, 0.9
    generation.max_new_tokens = 384  # one and a half times the longest answer
    model.half().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LEN,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    main()
