r"""How the micro-world's backbone is made from scratch: a Qwen2 of 0.8 million parameters, six minutes on a CPU.

    loss = sum_t w_t CE(t) / sum_t w_t,      w = 1 on answers, TEXT_WEIGHT on all other words

Documents are *packed*: several share a row of 64 tokens. A block-diagonal causal mask and restarting positions make a
document blind to its neighbours, so packing changes the cost and nothing else.

    row        the soup was lovely ask stars => four <eos> | ann owns the bank ask relation => owner <eos> | <pad>
    segment     0   0    0    0     0    0    0   0    0      1   1    1   1    1     1      1   1     1      -1

Matrices learn with Muon, whose step is the momentum made orthogonal; everything else with AdamW. With AdamW alone,
comparing two statements takes several times as many steps to learn.

`python -m tasks.pretrain --seed 1 --out DIR` makes one for `--backbone DIR`, with its scores.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from checkpoint import Parser, run_program, write_json
from tasks import micro

TEXT_WEIGHT = 0.015  # loss weight of a token outside the answers; about a tenth of the answers' share in all
ROW_TOKENS, ROWS_PER_STEP, DOCUMENTS_PER_STEP = 64, 24, 36
Document = tuple[list[int], list[float]]  # token ids, loss weights


def weigh_documents(seed: int, count: int, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Pretraining text; an answer and its end token weigh 1."""
    documents = []
    for questions in micro.documents(seed, count):
        ids, weights = [], []
        for text, answer in questions:
            text, answer = tokenizer(text).input_ids, tokenizer(f"{answer} {micro.EOS}").input_ids
            if len(ids) + len(text) + len(answer) <= ROW_TOKENS:  # a fourth long question may not fit any more
                ids += text + answer
                weights += [TEXT_WEIGHT] * len(text) + [1.0] * len(answer)
        documents.append((ids, weights))
    return documents


def pack(documents: Sequence[Document], row_tokens: int, pad_id: int) -> list[torch.Tensor]:
    """Documents (none longer than a row) in rows of `row_tokens`, each in the fullest open row with room for it.

    -> input_ids, weights, segments, positions, each (R, T); segments number the documents of a row, -1 is padding."""
    closed, open_rows = [], []  # rows of tokens (id, weight, segment, position)
    for ids, weights in documents:
        row = max((row for row in open_rows if len(row) + len(ids) <= row_tokens), key=len, default=[])
        if not row:
            open_rows.append(row)
            if len(open_rows) > 32:  # enough that rows end about full
                closed.append(open_rows.pop(max(range(32), key=lambda i: len(open_rows[i]))))
        segment = row[-1][2] + 1 if row else 0
        weights = [0.0, *weights[1:]]  # nothing in front of it predicts the first token of a document
        row += zip(ids, weights, [segment] * len(ids), range(len(ids)))
    padding = (pad_id, 0.0, -1, 0)
    rows = [row + [padding] * (row_tokens - len(row)) for row in closed + open_rows]
    return [torch.tensor([[token[part] for token in row] for row in rows]) for part in range(4)]


def read_packed(model: PreTrainedModel, ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor):
    """Logits (R, T, V) of packed rows (R, T): a token sees itself and what precedes it in its own document."""
    mask = torch.tril(segments[:, :, None] == segments[:, None, :])[:, None]  # (R, 1, T, T)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the cross-entropies of the next tokens; (R, T, V), (R, T), (R, T) -> scalar."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (w * losses).sum() / w.sum()


def new_backbone(tokenizer: PreTrainedTokenizerBase, seed: int, width: int = 128, layers: int = 4) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights: 4 query heads on 2 key/value heads, feed-forward 3 x width, separate head."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * width, tie_word_embeddings=False, initializer_range=0.05,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, attn_implementation="sdpa"))


def pretrain(model: PreTrainedModel, documents: Sequence[Document], seed: int, steps: int,
             rows_per_step: int = ROWS_PER_STEP) -> list[float]:
    """Train all weights, rows in a new random order each epoch; -> the loss of every step."""
    packed = pack(documents, ROW_TOKENS, model.config.pad_token_id)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="original"),
                  torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01)]
    generator, queue, losses = torch.Generator().manual_seed(seed), [], []
    model.train()
    for step in range(1, steps + 1):
        while len(queue) < rows_per_step:
            queue += torch.randperm(len(packed[0]), generator=generator).tolist()
        rows, queue = queue[:rows_per_step], queue[rows_per_step:]
        ids, weights, segments, positions = (tensor[rows] for tensor in packed)
        loss = weighted_loss(read_packed(model, ids, segments, positions), ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:  # 50 steps of warm-up, then down to zero
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * min(step / 50, 1 - (step - 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, steps // 20) == 0 or step == steps:
            print(f"pretrain step {step:5d}/{steps}  loss {loss:.4f}", flush=True)
    model.eval()
    return losses


@torch.no_grad()
def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> float:
    """Share of (text, answer) pairs whose answer and end token are the model's first choice at every position."""
    rows = [torch.tensor(tokenizer(f"{text} {answer} {micro.EOS}").input_ids) for text, answer in pairs]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (N, T); attention is causal, so without a mask
    guesses, starts = model(input_ids=padded).logits.argmax(-1), [len(tokenizer(text).input_ids) for text, _ in pairs]
    return sum(torch.equal(guess[start - 1 : len(row) - 1], row[start:])
               for row, guess, start in zip(rows, guesses, starts)) / len(rows)


def score_capabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 400) -> dict:
    """Exact match of every capability in every convention it knows, on `count` held-out combinations of words each:
    {"topic 0": ..., "topic mixed": ...}, by convention or mixed word by word; spans and options have no convention."""
    scores = {}
    for capability in [*micro.CONVENTIONS, *micro.SPANS, *micro.OPTIONS]:
        known = micro.CONVENTIONS.get(capability, [])
        for kind in [*range(len(known)), "mixed"] if known else [None]:
            rng, pairs = random.Random(f"scores 0 {capability} {kind}"), []
            while len(pairs) < count:
                body, answer, _ = micro.draw_candidate(rng, capability, rng.randrange(2))
                words = [rng.choice(row) for row in zip(*known)] if kind == "mixed" else known[kind] if known else []
                if micro.held_out(body):
                    prompt = f"{body} {micro.instruction(capability, ' '.join(words))} =>"
                    pairs.append((prompt, words[answer] if words else answer))
            scores[capability if kind is None else f"{capability} {kind}"] = share_right(model, tokenizer, pairs)
    return scores


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m tasks.pretrain", description="Make a backbone of the micro-world.")
    parser.add_argument("--out", required=True, help="folder for weights, tokenizer and scores.json")
    for name, default in (("seed", 0), ("steps", 1500), ("width", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default %(default)s)")
    made, tokenizer = vars(parser.parse_args(argv)), micro.tokenizer()
    out, seed, steps = made.pop("out"), made["seed"], made["steps"]
    model = new_backbone(tokenizer, seed, made["width"], made["layers"])
    losses = pretrain(model, weigh_documents(seed, DOCUMENTS_PER_STEP * steps, tokenizer), seed, steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    scores = score_capabilities(model, tokenizer)
    worst = min(scores, key=scores.get)
    print(f"{out}: {model.num_parameters():,} parameters, {len(scores)} capabilities asked for in words: mean "
          f"{sum(scores.values()) / len(scores):.3f}, worst {worst} {scores[worst]:.3f}")
    made |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "loss": round(losses[-1], 4)}
    write_json(Path(out) / "scores.json", made | {"scores": scores})


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
