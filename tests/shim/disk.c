/*
 * A disk that forgets: preloaded below a program, it keeps in a second folder what would be there after a power cut.
 *
 * Of a file below CLOISON_DISK_ROOT, the folder CLOISON_DISK_SHADOW holds what the last fsync or fdatasync of it found (content/KEY); of a
 * directory, the names that the last fsync of it found (names/KEY, lines of `KEY KIND NAME`). A KEY is inode number and birth time, so that
 * names can move and inode numbers can be used again. tests/src/lab/disk.rs makes the shadow's beginning and reads it after the cut.
 *
 * CLOISON_DISK_DEAF=1: syncs say that they did their work, and did nothing. CLOISON_DISK_KILL=N: the process dies before its Nth write to
 * the database itself, which in WAL mode only a checkpoint writes to.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *root, *shadow;
static int deaf;
static atomic_long left;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_pwrite64)(int, const void *, size_t, off64_t);

__attribute__((constructor)) static void begin(void)
{
    root = getenv("CLOISON_DISK_ROOT");
    shadow = getenv("CLOISON_DISK_SHADOW");
    deaf = getenv("CLOISON_DISK_DEAF") != NULL;
    const char *kill_at = getenv("CLOISON_DISK_KILL");
    atomic_store(&left, kill_at ? atol(kill_at) : 0);
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite");
    real_pwrite64 = dlsym(RTLD_NEXT, "pwrite64");
}

/* What cannot be kept would be taken for lost later: better to end here. */
static void give_up(const char *what)
{
    perror(what);
    _exit(99);
}

/* The path of an open file below the root, or NULL. */
static const char *path_of(int fd, char path[PATH_MAX])
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = root && shadow ? readlink(link, path, PATH_MAX - 1) : -1;
    if (length < 0)
        return NULL;
    path[length] = 0;
    size_t prefix = strlen(root);
    return strncmp(path, root, prefix) == 0 && (path[prefix] == 0 || path[prefix] == '/') ? path : NULL;
}

static int key_at(int fd, const char *name, int flags, char key[80], unsigned *mode)
{
    struct statx found;
    if (statx(fd, name, flags, STATX_BASIC_STATS | STATX_BTIME, &found) != 0)
        return -1;
    *mode = found.stx_mode;
    snprintf(key, 80, "%llu-%lld-%u", (unsigned long long)found.stx_ino, (long long)found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
    return 0;
}

static void keep_content(int fd, const char *key)
{
    char own[64], part[PATH_MAX], kept[PATH_MAX], buffer[1 << 16];
    snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
    snprintf(part, sizeof part, "%s/part", shadow);
    snprintf(kept, sizeof kept, "%s/content/%s", shadow, key);
    int from = open(own, O_RDONLY | O_CLOEXEC), to = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (from < 0 || to < 0)
        give_up("disk shim: opening");
    ssize_t length;
    while ((length = read(from, buffer, sizeof buffer)) > 0)
        if (real_write(to, buffer, (size_t)length) != length)
            give_up("disk shim: copying");
    if (length < 0 || close(from) != 0 || close(to) != 0 || rename(part, kept) != 0)
        give_up("disk shim: keeping content");
}

static void keep_names(const char *path, const char *key)
{
    char part[PATH_MAX], kept[PATH_MAX], own[80];
    unsigned mode;
    snprintf(part, sizeof part, "%s/part", shadow);
    snprintf(kept, sizeof kept, "%s/names/%s", shadow, key);
    DIR *folder = opendir(path);
    FILE *to = fopen(part, "we");
    if (!folder || !to)
        give_up("disk shim: listing");
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (key_at(dirfd(folder), entry->d_name, AT_SYMLINK_NOFOLLOW, own, &mode) == 0)
            fprintf(to, "%s %c %s\n", own, S_ISDIR(mode) ? 'd' : 'f', entry->d_name);
    }
    closedir(folder);
    if (fclose(to) != 0 || rename(part, kept) != 0)
        give_up("disk shim: keeping names");
}

static void keep(int fd)
{
    char path[PATH_MAX], key[80];
    unsigned mode;
    int before = errno;
    if (!deaf && path_of(fd, path) && key_at(fd, "", AT_EMPTY_PATH, key, &mode) == 0) {
        pthread_mutex_lock(&turn);
        if (S_ISDIR(mode))
            keep_names(path, key);
        else
            keep_content(fd, key);
        pthread_mutex_unlock(&turn);
    }
    errno = before;
}

int fsync(int fd)
{
    keep(fd);
    return real_fsync(fd);
}

int fdatasync(int fd)
{
    keep(fd);
    return real_fdatasync(fd);
}

static void count(int fd)
{
    char path[PATH_MAX];
    static const char database[] = "/cloison.db";
    if (atomic_load(&left) <= 0 || !path_of(fd, path))
        return;
    size_t length = strlen(path), tail = sizeof database - 1;
    if (length > tail && strcmp(path + length - tail, database) == 0 && atomic_fetch_sub(&left, 1) == 1)
        kill(getpid(), SIGKILL);
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    count(fd);
    return real_write(fd, bytes, length);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at)
{
    count(fd);
    return real_pwrite(fd, bytes, length, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at)
{
    count(fd);
    return real_pwrite64(fd, bytes, length, at);
}
