"""Write all picks of the training runs as the competition's solution: <paths.output>/solution.csv."""

from czii25d.pipeline.app import run
from czii25d.pipeline.solution import create_solution

if __name__ == "__main__":
    run(create_solution, "create_solution")
