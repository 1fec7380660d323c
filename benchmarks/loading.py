"""Host memory and time of loading a model in several processes: in each of them, or read by one and handed out.

    python benchmarks/loading.py --megabytes 2000 --processes 2 3

Makes a Llama with random weights, on a disk with room for it. All processes run on this machine, on the CPU, over gloo,
so that their shards are in host memory as well. Every tenth of a second, the memory of all processes is read from
`/proc/<pid>/smaps_rollup`, and that of the same processes before they load is subtracted:

    anonymous   pages of the processes' own, which cannot be given up
    of files    pages of mapped files, each counted once for all processes (PSS); given up when memory is needed
    RSS         the sum over processes, in which a shared page counts several times

Ways: `every process` loads the whole model and shards it; `one process` reads it and hands out the shards; `unsharded`
is data parallel without FSDP2. A dtype that differs from the file's is converted, into anonymous pages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

WAYS = ("every process", "one process", "unsharded")
FIELDS = {"Rss": "RSS", "Pss_Anon": "anonymous", "Pss_File": "of files"}
BASE = Path(__file__).resolve().parents[1] / "resofilter_trainer" / "demo" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="of the file")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--file", default="bfloat16", help="the dtype of the file")
    parser.add_argument("--dtype", default="bfloat16", help="the dtype in memory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", help="for the model; by default a temporary one")
    parser.add_argument("--worker", nargs=4, metavar=("WAY", "MODEL", "DTYPE", "NOTES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        model = Path(place) / "model"
        made = subprocess.run([sys.executable, "-c", MAKE, str(model), str(args.megabytes), args.file, str(BASE)],
                              check=True, capture_output=True, text=True).stdout.split()[-1]  # fmt: skip
        copy = float(made) * (4 if args.dtype == "float32" else 2) / 1e3
        print(f"{float(made):.0f}M parameters, {args.file} in the file; one copy in {args.dtype}: {copy:.2f} GB\n")
        print("| way | processes | peak: anonymous, GB | and of files | RSS | after: anonymous | and of files | s |")
        print("|---" * 8 + "|")
        for way in args.ways:
            for count in args.processes:
                peak, after, seconds = measured(way, count, model, args.dtype, Path(place))
                numbers = (peak["anonymous"], peak["of files"], peak["RSS"], after["anonymous"], after["of files"])
                print(f"| {way} | {count} | " + " | ".join(f"{each:.2f}" for each in numbers) + f" | {seconds:.0f} |",
                      flush=True)  # fmt: skip


MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
folder, megabytes, dtype, base = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
layer = 4 * 2048 * 2048 + 3 * 2048 * 5504
layers = max(round(megabytes * 1e6 / dtype.itemsize / layer), 4)
config = LlamaConfig.from_pretrained(base, num_hidden_layers=layers, hidden_size=2048, intermediate_size=5504,
                                     num_attention_heads=32, num_key_value_heads=32, head_dim=64)
model = AutoModelForCausalLM.from_config(config, dtype=dtype)
model.save_pretrained(folder, max_shard_size="500MB")
print(sum(each.numel() for each in model.parameters()) / 1e6)
"""


def measured(
    way: str, count: int, model: Path, dtype: str, place: Path
) -> tuple[dict[str, float], dict[str, float], float]:
    """The highest memory of all processes together, that at the end, and the seconds of the slowest process."""
    notes = Path(tempfile.mkdtemp(dir=place))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, __file__, "--worker", way, str(model), dtype, str(notes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before: dict[str, float] = {}
    peak, now = dict.fromkeys(FIELDS.values(), 0.0), dict.fromkeys(FIELDS.values(), 0.0)
    while run.poll() is None and len(list(notes.glob("*.done"))) < count:
        ready = list(notes.glob("*.ready"))
        if len(ready) == count:
            now = memory([int(each.stem) for each in ready])
            before = before or now
            (notes / "go").touch()
            if now["anonymous"] + now["of files"] > peak["anonymous"] + peak["of files"]:
                peak = now
        time.sleep(0.1)
    (notes / "end").touch()
    _, said = run.communicate()
    if run.returncode:
        raise SystemExit(said[-3000:])
    seconds = max(json.loads(each.read_text()) for each in notes.glob("*.done"))
    shutil.rmtree(notes)
    return less(peak, before), less(now, before), seconds


def less(found: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: found[name] - before[name] for name in found}


def memory(processes: list[int]) -> dict[str, float]:
    """The memory of some processes together, in GB."""
    found = dict.fromkeys(FIELDS.values(), 0.0)
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            if name in FIELDS:
                found[FIELDS[name]] += int(value.split()[0]) * 1024 / 1e9
    return found


def worker(way: str, model: str, dtype: str, place: str) -> None:
    """One process: load, and place the model as a pass does."""
    import torch
    from accelerate import PartialState
    from trl import SFTConfig

    from resofilter_trainer import ResonanceConfig
    from resofilter_trainer.data.fingerprints import hash_weights
    from resofilter_trainer.data.models import load_weights
    from resofilter_trainer.data.shared_loading import hash_of_first, load_to_shard
    from resofilter_trainer.model.sharding import shard

    state = PartialState(cpu=True, timeout=timedelta(seconds=300))
    kept = {"dtype": getattr(torch, dtype)}
    args = SFTConfig(place, use_cpu=True, bf16=False, report_to="none", model_init_kwargs=kept, disable_tqdm=True)
    notes = Path(place)
    (notes / f"{os.getpid()}.ready").touch()
    while not (notes / "go").exists():
        time.sleep(0.05)
    begun = time.perf_counter()
    loaded = load_to_shard(model, args) if way == "one process" else load_weights(model, args)
    _ = hash_of_first(loaded) if way == "one process" else hash_weights(loaded)
    if way != "unsharded":
        shard(loaded, ResonanceConfig(), torch.device("cpu"))
    seconds = time.perf_counter() - begun
    state.wait_for_everyone()
    time.sleep(0.5)
    (notes / f"{os.getpid()}.done").write_text(json.dumps(seconds))
    while not (notes / "end").exists():
        time.sleep(0.05)
    state.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
