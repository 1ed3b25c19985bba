"""A server that is not there: PipeMax's scheduler on simulated stages, with the report and the trace of a real run.

python examples/simulate_a_server.py benchmarks/model_configs/Llama-3.1-70B rtx-4090 8
"""

import dataclasses
import random
import sys
from pathlib import Path

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.profiles import server_profile
from pipemax.cost.workload import RequestLengths
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, simulate_pipeline
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.html_report import JobOutcome, write_html_report
from pipemax.report.manifest import run_manifest
from pipemax.report.recorder import StepRecorder

config, gpu, num_gpus = sys.argv[1:] or ("benchmarks/model_configs/Llama-3.1-70B", "rtx-4090", "8")
recorders = []


def watch(capacity):
    recorders.append(StepRecorder(capacity=capacity))
    return recorders[-1]


draw = random.Random(0)
run = simulate_pipeline(
    model=ModelSpec.from_pretrained(config),
    server=server_profile(gpu, int(num_gpus), host_memory_gib=512.0),
    workload=[RequestLengths(draw.randint(50, 600), draw.randint(20, 500)) for _ in range(400)],
    settings=PipelineSettings(phase_policy=PhasePolicyName.AUTO, kv_offload=KVOffload.ON),
    watch=watch,
)
print(f"{run.output_tokens_per_second:,.0f} output tokens/s, {run.seconds:,.0f} simulated seconds")
print("stages busy", " ".join(f"{share:.0%}" for share in run.stage_utilisation))

snapshot = recorders[0].snapshot()
manifest = run_manifest(command=sys.argv, settings={}, capacity=dataclasses.asdict(snapshot.capacity))
outcome = JobOutcome(f"simulated: {Path(config).name} on {num_gpus} x {gpu}", 0, 0, 0)
write_html_report(Path("report.html"), snapshot, outcome=outcome, manifest=manifest)
write_chrome_trace(Path("trace.json"), snapshot, manifest=manifest)
print("report.html and trace.json (open it in ui.perfetto.dev)")
