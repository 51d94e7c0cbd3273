/* Loaded before a program (LD_PRELOAD), moves its clocks while it runs.
 *
 * CLOISON_TEST_CLOCK names a file of three 64-bit numbers in the machine's byte order, mapped when first needed:
 *   [0] nanoseconds added to CLOCK_REALTIME (a wall clock that is wrong, or steps),
 *   [1] nanoseconds added to CLOCK_BOOTTIME (a machine that was suspended: CLOCK_MONOTONIC stands still meanwhile),
 *   [2] while it is not zero, a thread named packets-0 that asks for CLOCK_BOOTTIME does not get an answer (a stuck worker).
 * Without the variable nothing is changed. Only callers of the C library are moved: a program that asks the kernel directly is not. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const int64_t SECOND = 1000000000;
static const volatile int64_t *offsets;

__attribute__((constructor)) static void map_offsets(void) {
    const char *path = getenv("CLOISON_TEST_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, 3 * sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        offsets = mapped;
}

static void move(struct timespec *time, int64_t by) {
    int64_t nanos = (int64_t)time->tv_nsec + by % SECOND;
    time->tv_sec += by / SECOND + (nanos < 0 ? -1 : nanos / SECOND);
    time->tv_nsec = nanos < 0 ? nanos + SECOND : nanos % SECOND;
}

static void hold_if_told(void) {
    char name[16] = "";
    while (offsets[2] != 0) {
        prctl(PR_GET_NAME, name);
        if (strcmp(name, "packets-0") != 0)
            return;
        usleep(10000);
    }
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result != 0 || offsets == NULL)
        return result;
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        move(time, offsets[0]);
    if (clock == CLOCK_BOOTTIME) {
        hold_if_told();
        move(time, offsets[1]);
    }
    return result;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into)
        *into = now.tv_sec;
    return now.tv_sec;
}
