"""What ResonanceCallback adds to a step under FSDP2, on paper: memory, communication and FLOPs of one process.

    python benchmarks/sharded_cost.py                              # a Llama of 7B, by tensors without memory
    python benchmarks/sharded_cost.py --hidden 8192 --intermediate 28672 --layers 80 --rows 1

The model is made of meta tensors, and the library finds the matrices that it would measure. Counted are the products
`b^T a` of every row with 2 T I O operations, its passes over the (O, I) changes in tiles, and the float32 copies of the
rows of one layer, which live during that layer's backward.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from resofilter_trainer import ResonanceConfig
from resofilter_trainer.model.up_projection import find_up_projections

PASSES = 8  # element-wise, over the change of a matrix: the step's formula, its size, its sum
MEASUREMENT = 8  # bytes of a number


def main() -> None:
    args = _arguments()
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128, num_key_value_heads=args.hidden // 128, vocab_size=args.vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(each.numel() for each in model.parameters())
    measured = find_up_projections(model, args.n_layers, ResonanceConfig().up_projection)
    tokens = args.rows * args.tokens
    step = 6 * parameters * tokens
    products = sum(2 * tokens * each.entries for each in measured)
    passes = sum(PASSES * args.rows * each.entries for each in measured)
    outputs, inputs = measured[0].parameter.shape
    copies = tokens * (inputs + outputs) * 4
    shard = parameters / args.processes * 16  # bfloat16 weight and gradient, float32 master weight and two moments
    kept = args.dataset * (args.n_layers + 5) * MEASUREMENT
    print(f"{parameters / 1e9:.2f}B parameters, {args.processes} processes, {args.rows} rows of {args.tokens} tokens")
    print(f"measured: {len(measured)} matrices of {outputs} x {inputs}, {measured[0].entries / 1e6:.1f}M entries each")
    print(f"| of one process | the step | the callback | share |\n{'|---' * 4}|")
    print(f"| FLOPs | {step:.3g} | {products + passes:.3g} | {(products + passes) / step:.2%} |")
    print(f"| memory, GB | {shard / 1e9:.1f} and activations | {copies / 1e9:.2f} | {copies / shard:.2%} |")
    gathered = 3 * parameters * 2
    print(f"| communication, GB | {gathered / 1e9:.1f} | 0 | 0 |")
    print(f"at the end of an epoch, {args.dataset:,} rows: {kept / 1e6:.0f} MB gathered, and kept by each process")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--n_layers", type=int, default=3, help="measured layers")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of a process in one micro-batch")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--dataset", type=int, default=1_000_000, help="rows of the dataset")
    return parser.parse_args()


if __name__ == "__main__":
    main()
