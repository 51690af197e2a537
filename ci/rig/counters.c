// A plugin for QEMU 7.2 (TCG plugin API version 1, one processor, -icount shift=0): counts the
// instructions that Xen, dom0 and an HVM or PVH guest execute, and writes a line with all counters
// each time a marker is executed. A marker is a no-operation that no compiler makes:
//
//     0f 1f 84 00 'p' 'v' 'b' 'k'        nopl 0x6b627670(%rax,%rax,1)
//
// -plugin counters.so,out=FILE[,profile=FILE]
//
// With `profile`, how often each block of the guest was executed since the last line follows too.
//
// Whose an instruction is: Xen's code lies at a fixed address; VMRUN enters the guest, and the next
// instruction of Xen ends that. A PV domain that is not dom0 would be counted as dom0.
//
// QEMU's packages carry no header of this interface: it is declared here.

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*exec_callback)(unsigned cpu, void *data);

enum { NO_REGISTERS = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, exec_callback, int, void *);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, exec_callback, int, void *);
// Not of the plugin interface, but exported by builds that load modules. 1 is the virtual clock.
int64_t qemu_clock_get_ns(int clock) __attribute__((weak));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum who { XEN, DOM0_KERNEL, DOM0_USER, GUEST_KERNEL, GUEST_USER, WHO };
static const char *const NAMES[WHO] = {"xen", "dom0-kernel", "dom0-user", "guest-kernel",
                                       "guest-user"};

static uint64_t instructions[WHO], string_steps[WHO], system_calls[WHO];
static uint64_t vmmcalls, vmruns;
static int in_guest;

// The virtual clock, when it was last seen, and the instructions at that time. It can only be read
// while blocks are translated, not while they run.
static int64_t clock_seen;
static uint64_t clock_instructions;

static FILE *out, *profile;

struct block {
	uint64_t address, in_guest;
	struct block *next;
	uint32_t instructions;
	uint8_t ring; // XEN, DOM0_KERNEL or DOM0_USER: the latter two may be a guest's as well
	uint8_t is_string;
};
static struct block *blocks;

static uint64_t all_instructions(void)
{
	uint64_t sum = 0;
	for (int who = 0; who < WHO; who++)
		sum += instructions[who];
	return sum;
}

static int owner(const struct block *block)
{
	return block->ring == XEN || !in_guest ? block->ring : block->ring + 2;
}

static void on_block(unsigned cpu, void *data)
{
	struct block *block = data;
	if (block->ring == XEN)
		in_guest = 0;
	int who = owner(block);
	instructions[who] += block->instructions;
	string_steps[who] += block->is_string;
	block->in_guest += in_guest;
}

static void on_vmrun(unsigned cpu, void *data)
{
	vmruns++;
	in_guest = 1;
}

static void on_vmmcall(unsigned cpu, void *data)
{
	vmmcalls++;
}

static void on_syscall(unsigned cpu, void *data)
{
	system_calls[owner(data)]++;
}

static void on_marker(unsigned cpu, void *data)
{
	int who = owner(data);
	uint64_t all = all_instructions();
	fprintf(out, "MARK by=%s ns=%llu all=%llu", NAMES[who],
	        clock_seen ? (unsigned long long)(clock_seen + all - clock_instructions) : 0,
	        (unsigned long long)all);
	for (int i = 0; i < WHO; i++)
		fprintf(out, " %s=%llu", NAMES[i], (unsigned long long)instructions[i]);
	fprintf(out, " dom0-copies=%llu guest-copies=%llu vmmcall=%llu vmrun=%llu",
	        (unsigned long long)(string_steps[DOM0_KERNEL] + string_steps[DOM0_USER]),
	        (unsigned long long)(string_steps[GUEST_KERNEL] + string_steps[GUEST_USER]),
	        (unsigned long long)vmmcalls, (unsigned long long)vmruns);
	// A PV kernel runs outside of ring 0, and calls Xen by SYSCALL.
	fprintf(out, " dom0-hypercalls=%llu dom0-syscalls=%llu guest-syscalls=%llu\n",
	        (unsigned long long)system_calls[DOM0_KERNEL],
	        (unsigned long long)system_calls[DOM0_USER],
	        (unsigned long long)system_calls[GUEST_USER]);
	fflush(out);
	if (!profile || who < GUEST_KERNEL)
		return;
	for (struct block *block = blocks; block; block = block->next) {
		if (block->in_guest)
			fprintf(profile, "%llx %llu\n", (unsigned long long)block->address,
			        (unsigned long long)(block->in_guest * block->instructions));
		block->in_guest = 0;
	}
	fprintf(profile, "MARK\n");
	fflush(profile);
}

static int is_string(const uint8_t *code)
{
	if (code[0] != 0xf2 && code[0] != 0xf3)
		return 0;
	code += (code[1] & 0xf0) == 0x40 ? 2 : 1;
	return *code == 0xa4 || *code == 0xa5 || *code == 0xaa || *code == 0xab;
}

static void on_translation(plugin_id id, struct qemu_plugin_tb *tb)
{
	if (qemu_clock_get_ns) {
		clock_seen = qemu_clock_get_ns(1);
		clock_instructions = all_instructions();
	}
	struct block *block = calloc(1, sizeof *block);
	if (!block)
		abort();
	size_t count = qemu_plugin_tb_n_insns(tb);
	block->instructions = count;
	block->address = qemu_plugin_tb_vaddr(tb);
	block->ring = block->address >> 36 == 0xffff82d ? XEN
	              : block->address >> 63            ? DOM0_KERNEL
	                                                : DOM0_USER;
	if (profile) {
		block->next = blocks;
		blocks = block;
	}
	for (size_t i = 0; i < count; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		const uint8_t *code = qemu_plugin_insn_data(insn);
		size_t size = qemu_plugin_insn_size(insn);
		exec_callback callback = NULL;
		if (size == 3 && !memcmp(code, "\x0f\x01\xd8", 3))
			callback = on_vmrun;
		else if (size == 3 && !memcmp(code, "\x0f\x01\xd9", 3))
			callback = on_vmmcall;
		else if (size == 2 && !memcmp(code, "\x0f\x05", 2))
			callback = on_syscall;
		else if (size == 8 && !memcmp(code, "\x0f\x1f\x84\x00pvbk", 8))
			callback = on_marker;
		if (callback)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, callback, NO_REGISTERS, block);
		if (i == count - 1)
			block->is_string = size >= 2 && is_string(code);
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, NO_REGISTERS, block);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info,
                                                               int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4))
			out = fopen(argv[i] + 4, "w");
		else if (!strncmp(argv[i], "profile=", 8))
			profile = fopen(argv[i] + 8, "w");
	}
	if (!out)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	return 0;
}
