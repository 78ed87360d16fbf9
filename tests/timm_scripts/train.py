"""Trains a timm model for some steps: what each option does goes through timm's public functions, as in its own script.

It knows nothing of surgery. Written to --output: the CheckpointSaver's files, and eval.pt with what the trained model
(and its moving average) answers to one fixed batch.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import create_model, load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    CheckpointSaver,
    ModelEmaV3,
    NativeScaler,
    accuracy,
    dispatch_clip_grad,
    distribute_bn,
    freeze,
    init_distributed_device,
    is_primary,
    random_seed,
    unwrap_model,
)

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--output", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--num-classes", type=int)
parser.add_argument("--in-chans", type=int, default=3)
parser.add_argument("--img-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--stop-after", type=int, help="end after this epoch of the schedule")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--resume", default="")
parser.add_argument("--drop-path", type=float)
parser.add_argument("--layer-decay", type=float)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--grad-checkpointing", action="store_true")
parser.add_argument("--sync-bn", action="store_true")
parser.add_argument("--split-bn", action="store_true")
parser.add_argument("--freeze", default="", help="freeze this child of the model, its norms as well")
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--torchscript", action="store_true")
parser.add_argument("--torchcompile", default="")
parser.add_argument("--task", action="store_true", help="through timm.task, as train.py does since timm has it")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dist-backend", default=None)
parser.add_argument("--dist-url", default=None)


def main() -> None:
    args = parser.parse_args()
    device = init_distributed_device(args)
    random_seed(0, args.rank)
    model = create_model(
        args.model,
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        drop_path_rate=args.drop_path,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config(vars(args), model=model)
    if args.split_bn:
        model = convert_splitbn_model(model, 2)
    if args.freeze:
        freeze(model, [args.freeze])
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, momentum=0.9, weight_decay=0.0, layer_decay=args.layer_decay
    )
    start = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else 0
    loss_of = torch.nn.CrossEntropyLoss()
    if args.task:
        network, ema, saver = with_task(args, model, optimizer, loss_of, device)
    else:
        network, ema, saver = without_task(args, model, optimizer)

    loader = partial(create_loader, input_size=data_config["input_size"], batch_size=4, mean=(0.5,), std=(0.5,))
    loaders = [
        loader(
            create_dataset("", root=args.data, split=split, input_img_mode="L" if args.in_chans == 1 else "RGB"),
            is_training=split == "train",
            no_aug=True,
            num_workers=args.workers,
            distributed=args.distributed,
            device=device,
            use_prefetcher=False,
            persistent_workers=False,
        )
        for split in ("train", "validation")
    ]
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs, updates_per_epoch=len(loaders[0]))
    if start:
        schedule.step(start)
    for epoch in range(start or 0, args.stop_after or args.epochs):
        train(args, network, ema, loaders[0], optimizer, loss_of)
        if args.distributed:
            distribute_bn(network, args.world_size, reduce=True)
        metric = validate(args, network, loaders[1])
        if is_primary(args):
            saver.save_checkpoint(epoch, metric=metric)
        schedule.step(epoch + 1, metric)
    if is_primary(args):
        images = torch.randn(2, *data_config["input_size"], generator=torch.Generator().manual_seed(1))
        answers = {"model": answer(network, images)}
        if ema is not None:
            answers["ema"] = answer(ema.module, images)
        torch.save(answers, Path(args.output) / "eval.pt")
    if args.distributed:
        torch.distributed.destroy_process_group()


def without_task(args, model, optimizer):
    ema = ModelEmaV3(model, decay=0.5) if args.model_ema else None
    if ema is not None and args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    network = torch.nn.parallel.DistributedDataParallel(model) if args.distributed else model
    if args.torchcompile:
        network = torch.compile(network, backend=args.torchcompile)
    Path(args.output).mkdir(exist_ok=True, parents=True)
    saver = CheckpointSaver(network, optimizer, args, model_ema=ema, checkpoint_dir=str(args.output))
    return network, ema, saver


def with_task(args, model, optimizer, loss_of, device):
    from timm.task import ClassificationTask

    task = ClassificationTask(model, criterion=loss_of, device=device, verbose=False)
    if args.model_ema:
        task.setup_ema(decay=0.5)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed()
    Path(args.output).mkdir(exist_ok=True, parents=True)
    saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=str(args.output), task=task)
    return task, task.get_trainable_module(ema=True), saver


def train(args, network, ema, loader, optimizer, loss_of) -> None:
    network.train()
    scaler = NativeScaler(device="cpu") if args.amp else None
    for images, target in loader:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
            result = network(images, target) if args.task else network(images)
            loss = result["loss"] if args.task else loss_of(result, target)
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=model_parameters(network))
        else:
            loss.backward()
            if args.clip_grad is not None:
                dispatch_clip_grad(model_parameters(network), value=args.clip_grad)
            optimizer.step()
        optimizer.zero_grad()
        if args.task:
            network.update_ema()
        elif ema is not None:
            ema.update(unwrap_model(network))


@torch.no_grad()
def validate(args, network, loader) -> float:
    network.eval()
    model = network.get_eval_model() if args.task else network
    return sum(float(accuracy(model(images), target)[0]) for images, target in loader) / len(loader)


@torch.no_grad()
def answer(network, images):
    network.eval()
    model = network.get_eval_model() if hasattr(network, "get_eval_model") else network
    return model(images)


if __name__ == "__main__":
    main()
