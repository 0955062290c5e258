"""A head sharded by FSDP2 is gathered, and its gradient is averaged over processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from potstill.losses import fused_linear_divergence

N, V, H = 12, 30, 8


def one_process(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    body, head = layers()
    model = nn.Sequential(body, head)
    for module in (body, head, model):
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
    inputs, teacher, teacher_head = data()
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    hidden = body(inputs[mine])
    # FSDP averages gradients over 2 processes, so multiply by 2 and divide by all N tokens.
    loss = fused_linear_divergence(hidden, head.weight, teacher[mine], teacher_head, labels=None)
    (2 / N * loss).backward()
    gradients = {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(H, H), nn.Linear(H, V, bias=False)


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, teacher, head = (torch.randn(rows, H, generator=generator) for rows in (N, N, V))
    return inputs, teacher, head


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_a_sharded_head_get_the_gradients_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    body, head = layers()
    inputs, teacher, teacher_head = data()
    (fused_linear_divergence(body(inputs), head.weight, teacher, teacher_head) / N).backward()
    expected = {
        "0.weight": body.weight.grad,
        "0.bias": body.bias.grad,
        "1.weight": head.weight.grad,
    }
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
