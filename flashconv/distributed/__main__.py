"""`mlx.launch -n 2 -- python -m flashconv.distributed`: a photograph in slabs. nbs/tutorials/machines.ipynb explains it."""
from flashconv.distributed.demo import main

if __name__ == "__main__": main()
