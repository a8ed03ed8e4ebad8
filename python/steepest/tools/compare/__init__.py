"""Every optimizer of the zoo side by side: a small GPT and a classifier, over a sweep of learning rates.

steepest compare --quick
steepest compare --optimizers Muon,MuAdam,torch.AdamW --tasks gpt --text book.txt --out comparison

tasks, gpt, text, mushrooms     what is trained
methods                         who trains it, and at which learning rates
training, records               one run, and all of them as lines of JSON
report, pictures, progress      what is shown
command                         the whole of it
"""

from .command import add_options, run
from .methods import Method, known
from .tasks import Size, Task
from .training import train

__all__ = ["Method", "Size", "Task", "add_options", "known", "run", "train"]
