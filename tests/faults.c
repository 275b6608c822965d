// Kills the process by SIGKILL at system calls that change a folder, while a copy of it goes on to the next one.
//
// Loaded by LD_PRELOAD, so that the calls of Python, of safetensors and of the C library's users are all seen. At a
// chosen call the process forks: the parent is killed (of a write, half is done by then), the child reports itself and
// waits until what was left has been looked at, then does the call and goes on as the parent would have.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static long count, stride, first;
static int report_to, go_from, no_exchange;

void faults_arm(const char *folder, long every, long from, int report, int go, int without_exchange) {
    strncpy(root, folder, sizeof root - 1);
    stride = every, first = from, report_to = report, go_from = go, no_exchange = without_exchange;
}

long faults_seen(void) { return count; }

static int is_inside(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int is_inside_fd(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

static int is_inside_at(int at, const char *path) {
    char link[64], full[8192];
    if (!root[0] || !path) return 0;
    if (path[0] == '/') return is_inside(path);
    if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, full, 4095);
    if (length < 0) return 0;
    snprintf(full + length, sizeof full - length, "/%s", path);
    return is_inside(full);
}

static int is_chosen(void) { return stride && count % stride == first % stride; }

static void point(const char *call) {
    int before = errno, chosen = is_chosen();
    char go;
    count++;
    if (chosen) {
        // Without the handlers of libraries: autograd's forbid a copy of it to go on.
        pid_t (*bare)(void) = (pid_t (*)(void))dlsym(RTLD_DEFAULT, "_Fork");
        if (bare ? bare() : fork()) {
            kill(getpid(), SIGKILL);
            pause();
        }
        dprintf(report_to, "%d %ld %s\n", getpid(), count, call);
        while (read(go_from, &go, 1) < 0 && errno == EINTR) {}
    }
    errno = before;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(type, name, declared, passed, at, path)                    \
    type name declared {                                                   \
        if (is_inside_at(at, path)) point(#name);                          \
        return REAL(name) passed;                                          \
    }
#define ON_PATHS(type, name, declared, passed, at, path, at2, path2)       \
    type name declared {                                                   \
        if (is_inside_at(at, path) || is_inside_at(at2, path2)) point(#name); \
        return REAL(name) passed;                                          \
    }
#define ON_FD(type, name, declared, passed)                                \
    type name declared {                                                   \
        if (is_inside_fd(fd)) point(#name);                                \
        return REAL(name) passed;                                          \
    }
#define OPENED(name, declared, passed, at)                                 \
    int name declared {                                                    \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                      \
        if (flags & (O_CREAT | O_TRUNC) && is_inside_at(at, path)) point(#name); \
        return REAL(name) passed;                                          \
    }

OPENED(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENED(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENED(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPENED(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
ON_PATH(int, unlink, (const char *path), (path), AT_FDCWD, path)
ON_PATH(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path)
ON_PATH(int, rmdir, (const char *path), (path), AT_FDCWD, path)
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
ON_PATH(int, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(int, fchmodat, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags), at, path)
ON_PATH(int, truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path)
ON_PATHS(int, rename, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
ON_PATHS(int, renameat, (int p, const char *a, int q, const char *b), (p, a, q, b), p, a, q, b)
ON_PATHS(int, link, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
ON_PATHS(int, linkat, (int p, const char *a, int q, const char *b, int f), (p, a, q, b, f), p, a, q, b)
ON_PATHS(int, symlink, (const char *a, const char *b), (a, b), AT_FDCWD, b, AT_FDCWD, b)
ON_FD(int, ftruncate, (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_FD(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_FD(int, fchmod, (int fd, mode_t mode), (fd, mode))
ON_FD(ssize_t, pwrite, (int fd, const void *bytes, size_t size, off_t at), (fd, bytes, size, at))
ON_FD(ssize_t, pwrite64, (int fd, const void *bytes, size_t size, off64_t at), (fd, bytes, size, at))
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int many), (fd, parts, many))
ON_FD(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON_FD(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))

int renameat2(int p, const char *a, int q, const char *b, unsigned flags) {
    if (root[0] && no_exchange) {
        errno = ENOSYS;
        return -1;
    }
    if (is_inside_at(p, a) || is_inside_at(q, b)) point("renameat2");
    return REAL(renameat2)(p, a, q, b, flags);
}

ssize_t write(int fd, const void *bytes, size_t size) {
    if (is_inside_fd(fd)) {
        off_t at = is_chosen() && size > 1 ? lseek(fd, 0, SEEK_CUR) : -1;
        if (at >= 0 && REAL(write)(fd, bytes, size / 2) < 0) at = -1;
        point("write");
        if (at >= 0) lseek(fd, at, SEEK_SET);
    }
    return REAL(write)(fd, bytes, size);
}
