/* Messages round a ring, each rank adding its share, and allreduce of many sizes: every sum is checked. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#define LONGEST (4 << 20)

static int rank, ranks;

static void check(int good, const char *what, long at) {
    if (!good) {
        fprintf(stderr, "rank %d: %s is wrong at %ld\n", rank, what, at);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
}

/* A message of so many words goes round; each rank adds one more than its number to each. */
static void ring(unsigned *words, long count, unsigned round) {
    int next = (rank + 1) % ranks, last = (rank + ranks - 1) % ranks;
    if (rank == 0) {
        for (long i = 0; i < count; i++) {
            words[i] = (unsigned)i * 2654435761u + round;
        }
        MPI_Send(words, (int)count, MPI_UNSIGNED, next, 1, MPI_COMM_WORLD);
    }
    MPI_Recv(words, (int)count, MPI_UNSIGNED, last, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    /* Those before this rank have added 2 + 3 + … + rank, rank 0 having added nothing yet. */
    unsigned to = (unsigned)(rank == 0 ? ranks : rank), before = to * (to + 1) / 2 - 1;
    for (long i = 0; i < count; i++) {
        check(words[i] == (unsigned)i * 2654435761u + round + before, "the ring", i);
        words[i] += (unsigned)rank + 1;
    }
    if (rank != 0) {
        MPI_Send(words, (int)count, MPI_UNSIGNED, next, 1, MPI_COMM_WORLD);
    }
}

static long allreduce(long *mine, long *sums, long count, long round) {
    for (long i = 0; i < count; i++) {
        mine[i] = (i + round) * (rank + 1);
    }
    MPI_Allreduce(mine, sums, (int)count, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
    for (long i = 0; i < count; i++) {
        check(sums[i] == (i + round) * ranks * (ranks + 1) / 2, "allreduce", i);
    }
    return 1;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    unsigned *words = malloc(LONGEST);
    long *mine = malloc(LONGEST), *sums = malloc(LONGEST);
    check(words && mine && sums, "memory", 0);

    for (long count = 1; count <= 4096; count *= 4) {
        ring(words, count, (unsigned)count);
    }
    double begun = MPI_Wtime();
    for (unsigned round = 0; round < 60; round++) {
        ring(words, LONGEST / 4, round);
    }
    double took = MPI_Wtime() - begun;
    double rate = 60.0 * ranks * LONGEST / took / 1e6;

    long done = 0;
    begun = MPI_Wtime();
    for (long round = 0; round < 10; round++) {
        for (long count = 1; count <= (1 << 20) / 8; count *= 2) {
            done += allreduce(mine, sums, count, round);
        }
    }
    took = MPI_Wtime() - begun;
    if (rank == 0) {
        printf("mbyte/s %.1f allreduce/s %.1f\n", rate, (double)done / took);
    }
    MPI_Finalize();
    return 0;
}
