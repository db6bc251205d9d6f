"""`python -m flashconv`: a photograph through every layer. nbs/tutorials/photograph.ipynb explains it.

`python -m flashconv build` compiles the kernels ahead of their first use: nbs/kernels/01_build.ipynb.
"""
import sys

if __name__ == "__main__":
    if sys.argv[1:] == ["build"]: from flashconv.kernels.build import main
    else: from flashconv.demo import main
    sys.exit(main())
