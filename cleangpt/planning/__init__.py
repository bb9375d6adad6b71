"""Planning a run before renting a machine: memory, time and cost, from the experiment and data sheets."""
