/* A disk that fails: preloaded before libc, it spoils system calls on files whose path contains FAULT_UNDER.
 *
 * FAULT, read at every call, so that the process itself can arm and disarm it:
 *   space  after FAULT_AT bytes nothing more can be written (ENOSPC; the write that reaches it is cut short)
 *   short  no write takes more than FAULT_AT bytes
 *   lie    the write that holds byte FAULT_AT claims success, and stores nothing
 *   rename, fsync, mkdir  the FAULT_AT-th such call fails (EIO; mkdir: ENOSPC), counted from 0
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long done = 0; /* bytes or calls so far */

static int armed(const char *fault, const char *path) {
    const char *wanted = getenv("FAULT"), *under = getenv("FAULT_UNDER");
    if (!wanted || !*wanted) {
        done = 0;
        return 0;
    }
    return !strcmp(wanted, fault) && under && path && strstr(path, under) != NULL;
}

static int armed_for(const char *fault, int handle) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0) return 0;
    path[length] = 0;
    return armed(fault, path);
}

static long at(void) { return atol(getenv("FAULT_AT")); }

static int now(const char *fault, const char *path) { return armed(fault, path) && done++ == at(); }

ssize_t write(int handle, const void *from, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (armed_for("space", handle)) {
        if (done >= at()) {
            errno = ENOSPC;
            return -1;
        }
        if (done + (long)size > at()) size = at() - done;
        done += size;
    } else if (armed_for("short", handle)) {
        if ((long)size > at()) size = at();
    } else if (armed_for("lie", handle)) {
        long before = done;
        done += size;
        if (before <= at() && at() < done) return size;
    }
    return real(handle, from, size);
}

int fsync(int handle) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (armed_for("fsync", handle) && done++ == at()) {
        errno = EIO;
        return -1;
    }
    return real(handle);
}

int mkdir(const char *path, mode_t mode) {
    static int (*real)(const char *, mode_t);
    if (!real) real = dlsym(RTLD_NEXT, "mkdir");
    if (now("mkdir", path)) {
        errno = ENOSPC;
        return -1;
    }
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    if (now("rename", from)) {
        errno = EIO;
        return -1;
    }
    return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    static int (*real)(int, const char *, int, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "renameat");
    if (now("rename", from)) {
        errno = EIO;
        return -1;
    }
    return real(a, from, b, to);
}
