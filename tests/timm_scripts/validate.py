"""What a timm model with a checkpoint answers to one fixed batch, under the options of timm's validation script.

It knows nothing of surgery. The answers go to --output, with their time per batch (benchmark.py) beside them.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.data import resolve_data_config
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, load_checkpoint
from timm.utils import reparameterize_model, set_jit_fuser
from timm.utils.onnx import onnx_export

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--img-size", type=int, default=64)
parser.add_argument("--num-classes", type=int)
parser.add_argument("--use-ema", action="store_true")
parser.add_argument("--reparam", action="store_true")
parser.add_argument("--test-pool", action="store_true")
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--fuser", default="")
parser.add_argument("--fast-norm", action="store_true")
parser.add_argument("--torchscript", action="store_true")
parser.add_argument("--torchcompile", default="")
parser.add_argument("--aot-autograd", action="store_true")
parser.add_argument("--onnx", type=Path, help="export there instead, as onnx_export.py does")
parser.add_argument("--dynamo", action="store_true")


def main() -> None:
    args = parser.parse_args()
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    model = create_model(
        args.model, num_classes=args.num_classes, scriptable=args.torchscript, exportable=args.onnx is not None
    )
    load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    if args.reparam:
        model = reparameterize_model(model)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=True)
    size = data_config["input_size"]
    if args.onnx is not None:
        onnx_export(model.eval(), str(args.onnx), input_size=size, use_dynamo=args.dynamo, check_forward=True)
        return
    if args.test_pool:
        model, _ = apply_test_time_pool(model, data_config)
    model.eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.torchscript:
        model = torch.jit.script(model)
    elif args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    elif args.aot_autograd:
        from functorch.compile import memory_efficient_fusion

        model = memory_efficient_fusion(model)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
        for _ in range(3):  # a scripted model is only optimised from its second call on
            began = time.perf_counter()
            answers = model(images)
            elapsed = time.perf_counter() - began
    torch.save({"answers": answers.float(), "seconds": elapsed}, args.output)


if __name__ == "__main__":
    main()
