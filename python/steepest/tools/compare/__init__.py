"""Every optimizer of the zoo side by side: small models of text, tables and images, over learning rates.

steepest compare --quick
steepest compare --optimizers Muon,MuAdam,torch.AdamW --tasks gpt --text book.txt --out comparison
steepest compare --full

tasks, gpt, text, images, mushrooms     what is trained
methods                                 who trains it, and at which learning rates
training, jobs, records, provenance     one run, and all of them as lines of JSON; where they come from
report, pictures, progress              what is shown
full, evidence                          the search for the best rates, with more seeds, and what is shown of it
command                                 the whole of it
"""

from .command import add_options, run
from .methods import Method, known
from .tasks import Size, Task
from .training import train

__all__ = ["Method", "Size", "Task", "add_options", "known", "run", "train"]
