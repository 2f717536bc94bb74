r"""How the small backbones are made from scratch: a Qwen2 of about a million parameters in minutes on a CPU.

A document is a list of token ids with a loss weight per token,

    loss = sum_t w_t * CE(t) / sum_t w_t,      w = 1 on answers, TEXT_WEIGHT on all other words

and documents are *packed*: several share a row of 64 tokens instead of each being padded. A block-diagonal causal mask
and restarting positions make a document blind to its neighbours, so packing changes the cost and nothing else.

    row        the soup was lovely ask stars => four <eos> | ann owns the bank ask relation => owner <eos> | <pad>
    segment     0   0    0    0     0    0    0   0    0      1   1    1   1    1     1      1   1     1      -1

Matrices learn with Muon, whose step is the momentum made orthogonal; everything else (embeddings, head, norms, biases)
with AdamW. With AdamW alone what compares two statements needs several times the steps.

Two kinds of backbone: `pretrain_toy` (the micro-world of toy.py, with instructions) and `pretrain_text` (plain local
text, one token per character).
"""

import hashlib
import random
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import toy
from checkpoint import load_checkpoint, save_checkpoint, write_json
from errors import RunFailed, UserError

TEXT_WEIGHT = 0.015  # loss weight of a token outside the answers; about a tenth of the answers' share in all
ROW_TOKENS, ROWS_PER_STEP = 64, 24


def pack(documents, row_tokens, pad_id):
    """Pack documents into rows of `row_tokens`, each into the fullest of the open rows that still has room for it.

    documents: list of (token ids, loss weights). Returns (input_ids, weights, segments, positions), each (R, T);
    segments number the documents of a row from 0, -1 is padding. Raises ValueError for a document longer than a row.
    """
    closed, open_rows = [], []  # rows as [number of tokens, indices of documents]
    for i, (ids, _) in enumerate(documents):
        if len(ids) > row_tokens:
            raise ValueError(f"document {i} has {len(ids)} tokens, a row holds {row_tokens}; cut it or widen the rows")
        row = max((r for r in open_rows if r[0] + len(ids) <= row_tokens), key=lambda r: r[0], default=None)
        if row is None:
            row = [0, []]
            open_rows.append(row)
            if len(open_rows) > 32:  # enough that rows end about full
                closed.append(open_rows.pop(max(range(32), key=lambda r: open_rows[r][0])))
        row[0] += len(ids)
        row[1].append(i)
    rows = [row[1] for row in closed + open_rows]
    input_ids = torch.full((len(rows), row_tokens), pad_id)
    weights = torch.zeros(len(rows), row_tokens)
    segments = torch.full((len(rows), row_tokens), -1)
    positions = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members):
            ids, w = documents[i]
            end = start + len(ids)
            input_ids[r, start:end] = torch.tensor(ids)
            weights[r, start:end] = torch.tensor(w, dtype=torch.float)
            weights[r, start] = 0  # nothing before it predicts the first token of a document
            segments[r, start:end] = segment
            positions[r, start:end] = torch.arange(len(ids))
            start = end
    return input_ids, weights, segments, positions


def block_diagonal(segments):
    """True where a token may look: at itself and what precedes it in its own document. (R, T) -> (R, 1, T, T)"""
    same = segments[:, :, None] == segments[:, None, :]  # (R, T, T)
    return torch.tril(same)[:, None]


def step_loss(model, input_ids, weights, segments, positions):
    """Weighted cross-entropy of one batch of packed rows, each argument (R, T)."""
    logits = model(input_ids=input_ids, attention_mask=block_diagonal(segments), position_ids=positions).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (w * loss).sum() / w.sum().clamp(min=1e-9)


def new_backbone(vocab_size, pad_id, eos_id, width, layers, max_positions=512):
    """A Qwen2 with random weights: 4 query heads on 2 key/value heads, feed-forward 3 x width, separate head."""
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * width, tie_word_embeddings=False, initializer_range=0.05,
        max_position_embeddings=max_positions, pad_token_id=pad_id, eos_token_id=eos_id, bos_token_id=None,
        attn_implementation="sdpa"))


class Optimizers(list):
    """Several optimizers whose states are saved and loaded as one."""

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)


class Epochs:
    """Endless numbers of rows, `size` of them at a time, in a new random order each epoch."""

    def __init__(self, rows, size, seed):
        self.rows, self.size, self.queue, self.generator = rows, size, [], torch.Generator().manual_seed(seed)

    def next(self):
        while len(self.queue) < self.size:
            self.queue += torch.randperm(self.rows, generator=self.generator).tolist()
        taken, self.queue = self.queue[:self.size], self.queue[self.size:]
        return taken

    def state_dict(self):
        return {"queue": self.queue, "random": self.generator.get_state()}

    def load_state_dict(self, state):
        self.queue = list(state["queue"])
        self.generator.set_state(state["random"])


def pretrain(model, documents, pad_id, seed, steps, row_tokens=ROW_TOKENS, rows_per_step=ROWS_PER_STEP, log=print,
             checkpoint=None, signals=None, save_every=100, save_minutes=10.0):
    """Train all weights of a model on (token ids, loss weights) documents; -> the losses, one per step, and seconds.

    Rows are visited in a new random order each epoch. fp32: at this width bf16 autocast is slower on a CPU.
    checkpoint: the file to save to, and to go on from if it is there; signals: the Signals that a step is to outlast.
    Raises UserError for a checkpoint of something else, RunFailed for a loss that is not finite.
    """
    packed = pack(documents, row_tokens, pad_id)
    matrices = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = Optimizers([torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="original"),
                             torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01)])
    rates, epochs = [o.defaults["lr"] for o in optimizers], Epochs(len(packed[0]), rows_per_step, seed)
    now = {"losses": [], "seconds": 0.0}
    identity = {"text": hashlib.sha256(packed[0].numpy().tobytes()).hexdigest()[:16]}
    if checkpoint and checkpoint.exists():
        try:
            now = load_checkpoint(checkpoint, model.state_dict(), optimizers, epochs, now, identity)
        except ValueError as error:
            raise UserError(str(error)) from error
        log(f"pretrain goes on after step {len(now['losses'])} of {steps}")
    losses = now["losses"]
    start = saved = time.time()
    start -= now["seconds"]

    def save():
        if checkpoint:
            now["seconds"] = time.time() - start
            save_checkpoint(checkpoint, model.state_dict(), optimizers, epochs, now, identity)

    model.train()
    for step in range(len(losses) + 1, steps + 1):
        with signals.finishing(save) if signals else nullcontext():
            for optimizer, rate in zip(optimizers, rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(step / 50, 1 - (step - 1) / steps)
            rows = epochs.next()
            loss = step_loss(model, *(tensor[rows].to(model.device) for tensor in packed))
            if not torch.isfinite(loss):
                raise RunFailed(f"the loss is {loss.item()} at pretraining step {step}; try another --seed and --run")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if step % max(1, steps // 20) == 0 or step == steps:
                recent = losses[-max(1, steps // 20):]
                eta = (time.time() - start) / step * (steps - step)
                log(f"pretrain step {step:5d}/{steps} ({100 * step // steps:3d}%)  loss "
                    f"{sum(recent) / len(recent):.4f}  ETA {eta:4.0f}s")
            if step % save_every == 0 or step == steps or time.time() - saved > 60 * save_minutes:
                save()
                saved = time.time()
    model.eval()
    return losses, time.time() - start


def store(model, tokenizer, folder):
    """Write a backbone; RunFailed if it cannot be written, whatever error the libraries make of a full disk."""
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise RunFailed(f"the backbone cannot be written to {folder} ({error}); what was learned is in its checkpoint: "
                        "make room and repeat the command to go on") from error


# ------------------------------------------------------------------------------------------------------ the micro-world


def toy_documents(seed, count, tokenizer):
    """Instruction text of the micro-world as (token ids, loss weights); an answer and its end token weigh 1."""
    documents = []
    for questions in toy.documents(seed, count):
        ids, weights = [], []
        for text, answer in questions:
            text = tokenizer(text).input_ids
            answer = tokenizer(answer).input_ids + [tokenizer.eos_token_id]
            if len(ids) + len(text) + len(answer) <= ROW_TOKENS:  # a fourth long question may not fit any more
                ids += text + answer
                weights += [TEXT_WEIGHT] * len(text) + [1.0] * len(answer)
        documents.append((ids, weights))
    return documents


@torch.no_grad()
def answers_right(model, tokenizer, rows):
    """Fraction of (text, answer) pairs whose answer and end token are the model's first choice at every position."""
    right = 0
    for i in range(0, len(rows), 200):
        encoded = [(tokenizer(text).input_ids, tokenizer(answer).input_ids + [tokenizer.eos_token_id])
                   for text, answer in rows[i : i + 200]]
        documents = [(text + answer, [0.0] * len(text) + [1.0] * len(answer)) for text, answer in encoded]
        ids, weights, segments, positions = pack(documents, max(len(d[0]) for d in documents), tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=block_diagonal(segments), position_ids=positions).logits
        wrong = (logits[:, :-1].argmax(-1) != ids[:, 1:]) & (weights[:, 1:] > 0)  # (R, T - 1)
        for row, missed in zip(segments, wrong):
            right += int(row.max()) + 1 - len(row[1:][missed].unique())
    return right / len(rows)


def score_capabilities(model, tokenizer, seed=0, count=400):
    """Exact match of every capability, in every convention it knows, on `count` held-out combinations of words each.

    Returns {"topic 0": ..., "topic mixed": ...}: convention 0, 1, 2 or mixed word by word; spans and choice have none.
    """
    scores = {}
    for capability in [*toy.CONVENTIONS, *toy.SPANS, *toy.OPTIONS]:
        known = toy.CONVENTIONS.get(capability)
        for kind in [*range(len(known)), "mixed"] if known else [None]:
            rng, rows = random.Random(f"scores {seed} {capability} {kind}"), []
            while len(rows) < count:
                body, answer, _ = toy.candidate(rng, capability, rng.randrange(2))
                words = None
                if known:
                    words = known[kind] if kind != "mixed" else [rng.choice(row) for row in zip(*known)]
                if toy.held_out(body):
                    prompt = f"{body} {toy.instruction(capability, words and ' '.join(words))} =>"
                    rows.append((prompt, words[answer] if words else answer))
            scores[capability if kind is None else f"{capability} {kind}"] = answers_right(model, tokenizer, rows)
    return scores


def pretrain_toy(folder=toy.FOLDER, seed=0, steps=1500, width=128, layers=4, log=print, device="cpu", **saving):
    """Make the micro-world's backbone in `folder`: weights, tokenizer, scores.json; -> (model, tokenizer, scores).

    saving: checkpoint, signals and so on, as `pretrain` takes them.
    """
    tokenizer = toy.tokenizer()
    torch.manual_seed(seed)
    model = new_backbone(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, width, layers).to(device)
    log(f"pretraining a Qwen2 of {model.num_parameters():,} parameters on the micro-world, seed {seed}")
    losses, seconds = pretrain(model, toy_documents(seed, 36 * steps, tokenizer), tokenizer.pad_token_id, seed, steps,
                               log=log, **saving)
    store(model, tokenizer, folder)
    model, tokenizer = toy.load_backbone(folder)  # score what was stored
    scores = score_capabilities(model, tokenizer)
    worst = min(scores, key=scores.get)
    log(f"{len(scores)} capabilities with the instruction in the text, mean {sum(scores.values()) / len(scores):.3f}, "
        f"worst {worst} {scores[worst]:.3f}; {seconds:.0f}s; saved in {folder}")
    record = {"command": f"python train.py --stage pretrain --seed {seed} --pretrain-steps {steps} --pretrain-width "
                         f"{width} --pretrain-layers {layers}", "seed": seed, "steps": steps,
              "seconds": round(seconds), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "loss": round(losses[-1], 4), "scores": scores}
    write_json(Path(folder) / "scores.json", record)
    return model, tokenizer, scores


# ------------------------------------------------------------------------------------------------------------- any text


def character_tokenizer(texts, vocab_size=6000):
    """One token per character (and per line break), the most frequent ones of the texts; pad, eos and unk differ."""
    from collections import Counter

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    counts = Counter(character for text in texts for character in text)
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - 3]
    vocabulary = {token: i for i, token in enumerate([toy.PAD, toy.EOS, toy.UNK, *frequent])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=toy.UNK))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=toy.PAD, eos_token=toy.EOS, unk_token=toy.UNK)


def pretrain_text(folder, texts, seed=0, steps=1500, width=128, layers=4, row_tokens=256, rows_per_step=16, log=print,
                  device="cpu", **saving):
    """Make a character-level backbone in `folder` from plain texts (list of str). Returns (model, tokenizer).

    A text longer than a row is cut into pieces; the loss counts every character and the end of each text.
    saving: as in `pretrain_toy`. Raises ValueError if there is no text.
    """
    if not any(texts):
        raise ValueError("there is no text to pretrain on; give at least one string that is not empty")
    tokenizer = character_tokenizer(texts)
    documents = []
    for ids in tokenizer([text for text in texts if text], add_special_tokens=False).input_ids:
        ids = ids + [tokenizer.eos_token_id]
        pieces = [ids[i : i + row_tokens] for i in range(0, len(ids), row_tokens)]
        documents += [(piece, [1.0] * len(piece)) for piece in pieces]
    torch.manual_seed(seed)
    model = new_backbone(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, width, layers, 4096).to(device)
    tokens = sum(len(ids) for ids, _ in documents)
    log(f"pretraining a Qwen2 of {model.num_parameters():,} parameters on {tokens:,} characters of text, "
        f"{len(tokenizer):,} distinct tokens, {steps * row_tokens * rows_per_step / tokens:.1f} epochs, seed {seed}")
    pretrain(model, documents, tokenizer.pad_token_id, seed, steps, row_tokens, rows_per_step, log, **saving)
    store(model, tokenizer, folder)
    return model, tokenizer
