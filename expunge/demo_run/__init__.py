"""The main job on the bundled model, end to end: train an SPM, erase with it, draw before and after, score, show."""

from expunge.demo_run.run import DemoResult as DemoResult
from expunge.demo_run.run import run_demo as run_demo
