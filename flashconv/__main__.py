"""`python -m flashconv`: a photograph through every layer. nbs/tutorials/photograph.ipynb explains it."""

from flashconv.demo import main

if __name__ == "__main__": main()
