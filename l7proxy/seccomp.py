"""The system calls the proxy may make: an allowlist as classic BPF, installed for good. Everything else is EPERM.

What Python, uvloop and OpenSSL use on an event loop with sockets handed over by the agent, and no call that makes a
socket, loads a program, starts one, enters a namespace or looks into another process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct


def _words(text: str) -> list[str]:
    return text.split()


ALLOWED = frozenset(
    _words("""
    read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range open openat stat fstat lstat newfstatat
    statx access faccessat faccessat2 readlink readlinkat getcwd getdents64 fadvise64 ftruncate umask dup dup2 dup3 fcntl
    pipe pipe2 poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    timerfd_create timerfd_settime accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt sendto
    recvfrom sendmsg recvmsg sendmmsg recvmmsg mmap munmap mprotect mremap madvise brk mincore memfd_create membarrier futex
    set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity getcpu arch_prctl rt_sigaction
    rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall pause fork vfork
    wait4 waitid exit exit_group kill tgkill alarm setitimer getpid getppid gettid getuid geteuid getgid getegid getgroups
    getresuid getresgid getpgrp getpgid getsid capget nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
    times getrusage getrlimit uname sysinfo getrandom
    """)
)

# x86-64's numbers (arch/x86/entry/syscalls/syscall_64.tbl)
_X86_64 = _words("""
    read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13
    rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 pread64=17 pwrite64=18 readv=19 writev=20 access=21 pipe=22 select=23
    sched_yield=24 mremap=25 mincore=27 madvise=28 dup=32 dup2=33 pause=34 nanosleep=35 alarm=37 setitimer=38 getpid=39
    socket=41 connect=42 accept=43 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47 shutdown=48 bind=49 listen=50 getsockname=51
    getpeername=52 socketpair=53 setsockopt=54 getsockopt=55 clone=56 fork=57 vfork=58 execve=59 exit=60 wait4=61 kill=62
    uname=63 fcntl=72 ftruncate=77 getcwd=79 readlink=89 umask=95 gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99
    times=100 ptrace=101 getuid=102 getgid=104 geteuid=107 getegid=108 getppid=110 getpgrp=111 getgroups=115 getresuid=118
    getresgid=120 getpgid=121 getsid=124 capget=125 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130 sigaltstack=131
    prctl=157 arch_prctl=158 mount=165 init_module=175 gettid=186 time=201 futex=202 sched_getaffinity=204 getdents64=217
    set_tid_address=218 restart_syscall=219 fadvise64=221 clock_gettime=228 clock_getres=229 clock_nanosleep=230
    exit_group=231 epoll_wait=232 epoll_ctl=233 tgkill=234 kexec_load=246 waitid=247 add_key=248 keyctl=250 openat=257
    newfstatat=262 readlinkat=267 faccessat=269 pselect6=270 ppoll=271 unshare=272 set_robust_list=273 get_robust_list=274
    epoll_pwait=281 timerfd_create=283 timerfd_settime=286 accept4=288 eventfd2=290 epoll_create1=291 dup3=292 pipe2=293
    preadv=295 pwritev=296 perf_event_open=298 recvmmsg=299 prlimit64=302 sendmmsg=307 setns=308 getcpu=309
    process_vm_readv=310 process_vm_writev=311 finit_module=313 sched_setattr=314 getrandom=318 memfd_create=319 bpf=321
    execveat=322
    userfaultfd=323 membarrier=324 statx=332 rseq=334 io_uring_setup=425 io_uring_enter=426 pidfd_open=434 clone3=435
    close_range=436 pidfd_getfd=438 faccessat2=439 epoll_pwait2=441
""")
NUMBERS = {name: int(number) for name, _, number in (pair.partition("=") for pair in _X86_64)}

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_NEW_NAMESPACE = 0x7E020080  # every CLONE_NEW* flag
_IOCTLS = (0x5421, 0x541B, 0x5450, 0x5451, 0x5401)  # FIONBIO FIONREAD FIONCLEX FIOCLEX TCGETS
_PRCTLS = (1, 15)  # PR_SET_PDEATHSIG PR_SET_NAME
_AF_UNIX = 1

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _TSYNC = 1, 1
_SECCOMP = 317


class SeccompError(OSError):
    """The filter could not be installed; the proxy must not start."""


def _op(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, k)


def _one_of(name: str, argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow a call when the low word of an argument is one of these."""
    body = [_op(_LOAD, _ARGS + 8 * argument)]
    for value in values:
        body += [_op(_JEQ, value, 0, 1), _op(_RET, _ALLOW)]
    body.append(_op(_RET, _ERRNO | errno.EPERM))
    return [_op(_JEQ, NUMBERS[name], 0, len(body)), *body]


def program() -> bytes:
    """The filter, as an array of ``struct sock_filter``."""
    denied = _op(_RET, _ERRNO | errno.EPERM)
    out = [_op(_LOAD, _ARCH), _op(_JEQ, _ARCH_X86_64, 1, 0), denied]
    out += [_op(_LOAD, _NR), _op(_JGE, _X32_BIT, 0, 1), denied]
    for name in sorted(ALLOWED, key=lambda name: NUMBERS[name]):
        out += [_op(_JEQ, NUMBERS[name], 0, 1), _op(_RET, _ALLOW)]
    # forks and threads, no namespaces; clone3 hides its flags in memory, so the C library is sent back to clone
    out += [
        _op(_JEQ, NUMBERS["clone"], 0, 4),
        _op(_LOAD, _ARGS),
        _op(_JSET, _NEW_NAMESPACE, 1, 0),
        _op(_RET, _ALLOW),
        denied,
        _op(_JEQ, NUMBERS["clone3"], 0, 1),
        _op(_RET, _ERRNO | errno.ENOSYS),
    ]
    out += _one_of("ioctl", 1, _IOCTLS)
    out += _one_of("prctl", 0, _PRCTLS)
    out += _one_of("socketpair", 0, (_AF_UNIX,))
    out += _one_of("sched_setattr", 0, (0,))  # its own: without a capability it gets no more of a processor by that
    # prlimit64 to read its own limits: pid 0, no new value (both words of the pointer)
    out += [
        _op(_JEQ, NUMBERS["prlimit64"], 0, 8),
        _op(_LOAD, _ARGS),
        _op(_JEQ, 0, 0, 5),
        _op(_LOAD, _ARGS + 16),
        _op(_JEQ, 0, 0, 3),
        _op(_LOAD, _ARGS + 20),
        _op(_JEQ, 0, 0, 1),
        _op(_RET, _ALLOW),
        denied,
    ]
    out.append(denied)
    return b"".join(out)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install() -> None:
    """No way back, for this thread, its siblings and children. Raises SeccompError."""
    if platform.machine() != "x86_64":
        raise SeccompError(errno.ENOSYS, f"no system call table for {platform.machine()}; the proxy does not run unconfined")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise SeccompError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS failed")
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    wanted = _Program(len(code) // 8, ctypes.addressof(buffer))
    if libc.syscall(_SECCOMP, _SET_MODE_FILTER, _TSYNC, ctypes.byref(wanted)):
        error = ctypes.get_errno()
        raise SeccompError(error, f"seccomp filter: {os.strerror(error)}; the kernel needs CONFIG_SECCOMP_FILTER")
