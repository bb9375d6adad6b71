"""What a run will take, before a machine is rented: memory, time and cost, from the experiment and a data sheet."""
