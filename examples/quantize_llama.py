"""Quantizes a Llama from a Hugging Face directory, saves it packed, and compares it with the float model.

    python examples/quantize_llama.py --out packed
    python examples/quantize_llama.py --model Llama-dir --calibration train.txt --text held_out.txt --out packed

Without --model it takes the small model that comes with jgptq, and for text the source of Python's standard library,
which that model was trained on (evaluation modules were kept out). `jgptq quantize`, `jgptq eval` and
`jgptq generate` do the same from the command line.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp

import jgptq
from jgptq import calibration, demo_text

DEMO_MODEL = Path(jgptq.__file__).parent / "demo_model"


def texts(file, *, held_out):
    return demo_text.read_modules(held_out=held_out) if file is None else calibration.read_documents(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--calibration", type=Path, help="a text file")
    parser.add_argument("--text", type=Path, help="a text file to evaluate on")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--prompt", default="def read(self):\n    ")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    # A float model: the parameters are a nested dict of arrays, model.apply(params, tokens) gives logits.
    model, params = jgptq.load(args.model, dtype=jnp.float32)
    tokenizer = calibration.load_tokenizer(args.model)

    # Random windows of the calibration text, with the tokenizer's BOS in front where the model was trained so.
    batches = calibration.batches(
        texts(args.calibration, held_out=False), tokenizer, samples=args.samples, seq_len=args.seq_len
    )
    grid = jgptq.Grid(bits=args.bits, group_size=args.group_size)
    packed, report = jgptq.quantize(
        model.apply,
        params,
        batches,
        grid=grid,
        progress=lambda row, done, total: print(f"{done}/{total} {row.path}: loss {row.loss:.4g}"),
    )
    for note in report.notes:
        print(f"note: {note}")

    # A directory in the GPTQ layout; loading it gives back the same parameters, bit for bit.
    jgptq.save(args.out, model, packed)
    model, packed = jgptq.load(args.out)

    held_out = calibration.encode(texts(args.text, held_out=True), tokenizer)[:8_000]
    cost = jgptq.compare(
        model, packed, model, params, held_out, seq_len=args.seq_len, bos_token_id=calibration.bos_token(tokenizer)
    )
    print(f"perplexity {cost.perplexity:.3f} (float {cost.reference_perplexity:.3f}), KL {cost.kl:.4f} nats a token")

    prompt = tokenizer.encode(args.prompt).ids
    print(tokenizer.decode(jgptq.generate(model, packed, prompt, max_new_tokens=32).tolist()))


if __name__ == "__main__":
    main()
