"""Make a small simulated data set in the competition's layout."""

from czii25d.pipeline.app import run
from czii25d.pipeline.phantom import make_phantom

if __name__ == "__main__":
    run(make_phantom, "phantom")
